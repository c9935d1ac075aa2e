// The tiles of a scan (piece_scan.cuh). A block processes the members of consecutive pieces, for 4 packs of channels.
// First, asynchronous copies that bypass the registers bring all rows into shared memory, regardless of the pieces, so
// that all rows of a tile are in flight at once. Then each group of 4 lanes walks a piece and only accesses shared
// memory. A lane always processes the same channels, which no other lane accesses, so the order of every sum is fixed.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/pieces.cuh"

namespace grootvl::cuda {

// Lanes per row of a tile, threads per block, and groups of lanes per block. With narrow rows, a tile has more of them,
// so that differences between the lengths of pieces waste less shared memory.
constexpr int kRowLanes = 4, kTileThreads = 256, kTileGroups = kTileThreads / kRowLanes;
constexpr int kWarpGroups = kWarpSize / kRowLanes;

// The intended number of resident blocks per multiprocessor: some load while others walk their pieces.
template <typename acc_t, int kStreams>
constexpr int kTileBlocks = sizeof(acc_t) > 4 ? 2
                            : kStreams == 1   ? 4
                                              : 3;

// The number of rows whose vertices and links a group reads at once: most tiles have fewer rows for each group, so that
// their copies start after one wait for memory.
constexpr int kRowsAtOnce = 8;

// The image and the channels of a lane: blocks along the x axis are images x groups of channels. Lanes beyond the last
// channel read what the first lane of their row reads, which no other block writes, and write nothing.
template <int kPack>
struct LanePlace {
  int64_t image, channel;
  int channel_tile, lane, group;
  bool is_active;

  __device__ explicit LanePlace(int64_t channels) {
    const int64_t tiles = divide_up<int64_t>(channels, kRowLanes * kPack);
    lane = static_cast<int>(threadIdx.x) % kRowLanes;
    group = static_cast<int>(threadIdx.x) / kRowLanes;
    image = blockIdx.x / tiles;
    channel_tile = static_cast<int>(blockIdx.x % tiles);
    const int64_t first = static_cast<int64_t>(channel_tile) * kRowLanes * kPack;
    is_active = first + lane * kPack < channels;
    channel = is_active ? first + lane * kPack : first;
  }
};

// The distribution of a tree's pieces over tiles. Each of the first `full` tiles has the pieces that begin within
// `rows` slots. The rest, `rest` slots with the shortest pieces, is divided into a half and two quarters, since many
// short pieces would wait for the longest among them. A tile has at most `capacity` rows, including the root in the
// first tile.
struct Tiling {
  int rows, capacity, full, rest, tiles;

  // The number of tiles into which the rest is divided.
  static constexpr int kOfRest = 3;

  // Where a tile begins, and the one before it ends.
  __device__ int begin(int tile) const {
    const int all = full * rows + rest, after = tile - full;
    return after <= 0 ? tile * rows : tile == tiles ? all : all - (rest >> after);
  }
};

// The pieces and slots of one tile. The root, in the first tile only, follows the members.
struct Tile {
  int first_piece, end_piece, first_slot, members, rows;
};

// Called by all threads of a block.
__device__ inline Tile find_tile(const TreePieces& tree, const Tiling& tiling, int index) {
  // The first pieces of this tile and of the next one, and their first slots.
  __shared__ int pieces[2];
  __shared__ int slots[2];
  const int limits[2] = {tiling.begin(index), tiling.begin(index + 1)};
  // Wait until no thread reads the values of the previous tile anymore.
  __syncthreads();
  if (threadIdx.x < 2) {
    pieces[threadIdx.x] = tree.pieces;
    slots[threadIdx.x] = tiling.begin(tiling.tiles);
  }
  __syncthreads();
#pragma unroll 4
  for (int piece = threadIdx.x; piece < tree.pieces; piece += kTileThreads) {
    const int first = __ldg(tree.first + piece), before = piece == 0 ? -1 : __ldg(tree.first + piece - 1);
#pragma unroll
    for (int end = 0; end < 2; ++end) {
      if (before < limits[end] && limits[end] <= first) {
        pieces[end] = piece;
        slots[end] = first;
      }
    }
  }
  __syncthreads();
  const int members = slots[1] - slots[0];
  return {pieces[0], pieces[1], slots[0], members, members + (index == 0)};
}

// The shared memory of a tile. For each row: the value of each stream, the decay or its gradient, vertex and link.
template <typename acc_t, int kPack, int kStreams>
struct Cells {
  using Values = Pack<acc_t, kPack>;

  // The place of the decays or their gradients among the values of the streams.
  static constexpr int kKept = kStreams;

  Values* own;
  int *vertex, *link;
  int capacity;

  static constexpr int64_t kRowBytes = (kStreams + 1) * kRowLanes * sizeof(Values) + 2 * sizeof(int);

  __device__ Cells(int capacity, int lane) : capacity(capacity) {
    Values* const memory = shared_memory_as<Values>();
    own = memory + lane;
    vertex = reinterpret_cast<int*>(memory + (kStreams + 1) * capacity * kRowLanes);
    link = vertex + capacity;
  }
  __device__ Values& operator()(int stream, int row) const {
    return own[(stream * capacity + row) * kRowLanes];
  }
  __device__ Values& kept(int row) const {
    return (*this)(kKept, row);
  }
  // The values of all lanes.
  __device__ acc_t* of_lanes(int stream, int row) const {
    return shared_memory_as<acc_t>() + (stream * capacity + row) * kRowLanes * kPack;
  }
  // Starts an asynchronous copy of a pack to the memory of a value; as<T> reads the pack after the copy.
  template <typename T>
  __device__ void copy(const T* from, int stream, int row) const {
    __pipeline_memcpy_async(&(*this)(stream, row), from, sizeof(Pack<T, kPack>));
  }
  template <typename T>
  __device__ const Pack<T, kPack>& as(int stream, int row) const {
    return *reinterpret_cast<const Pack<T, kPack>*>(&(*this)(stream, row));
  }
};

// Calls visit(rows of the group, kCount at a time) for all rows of a tile. The lanes of a warp stay together, since
// `visit` may exchange values between them; it must skip rows beyond the last one.
template <int kCount, typename Visit>
__device__ void for_each_batch(int group, int rows, const Visit& visit) {
  const int in_warp = group % kWarpGroups;
  for (int first = group - in_warp; first < rows; first += kCount * kTileGroups) {
    int of_group[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      of_group[j] = first + in_warp + j * kTileGroups;
    }
    visit(of_group);
  }
}

// Fills the cells of a tile. `Input` defines kStreams and, for rows and the channels of this lane:
//   copy(row, channel, cells, to)           starts copying a row of memory to the cells of row `to`
//   prepare(place, first_row, rows, cells)  computes the values of the streams and the decays from the copies
template <typename acc_t, int kPack, typename Input>
__device__ void load_tile(
    const Input& input,
    const LanePlace<kPack>& place,
    const TreePieces& tree,
    const Tile& tile,
    int64_t first_row,
    const Cells<acc_t, kPack, Input::kStreams>& cells) {
  for_each_batch<kRowsAtOnce>(place.group, tile.rows, [&](const int (&rows)[kRowsAtOnce]) {
    int vertices[kRowsAtOnce], links[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const bool is_member = rows[j] < tile.members;
      vertices[j] = __ldg(is_member ? tree.vertex + tile.first_slot + rows[j] : tree.critical_vertex);
      links[j] = is_member ? __ldg(tree.link + tile.first_slot + rows[j]) : -1;
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      if (rows[j] < tile.rows) {
        input.copy(first_row + vertices[j], place.channel, cells, rows[j]);
        if (place.lane == 0) {
          cells.vertex[rows[j]] = vertices[j];
          cells.link[rows[j]] = links[j];
        }
      }
    }
  });
  __pipeline_commit();
  // Makes the vertices written by lane 0 visible to its group.
  __syncwarp();
  input.prepare(place, first_row, tile.rows, cells);
  __syncthreads();
}

// A piece in a tile: its rows, and what else the kernels need of it; -1 for the bottom and its place if there is none.
struct PieceRows {
  int begin, members, bottom, bottom_place, top;

  // All zero beyond the last piece of the tile.
  __device__ static PieceRows load(const TreePieces& tree, const Tile& tile, int piece) {
    if (piece >= tile.end_piece) {
      return {};
    }
    const int slot = __ldg(tree.first + piece);
    return {
        slot - tile.first_slot,
        __ldg(tree.first + piece + 1) - slot,
        __ldg(tree.bottom + piece),
        __ldg(tree.bottom_place + piece),
        __ldg(tree.top + piece)};
  }
};

// Calls visit(place, place of the parent, decay) for the members of a piece except the first, whose parent is the top:
// upwards from the last or downwards from the second. The next link and decay are prefetched, so that only the sums
// depend on each other. The links of these members are places in the piece, so that `visit` needs no branch.
template <bool kAscending, typename acc_t, int kPack, int kStreams, typename Visit>
__device__ void for_each_member(
    const Cells<acc_t, kPack, kStreams>& cells, int begin, int members, const Visit& visit) {
  int i = kAscending ? 1 : members - 1;
  if (members < 2) {
    return;
  }
  int link = cells.link[begin + i];
  Pack<acc_t, kPack> kept = cells.kept(begin + i);
  for (int done = 1; done < members; ++done) {
    const int next = kAscending ? min(i + 1, members - 1) : i - 1;
    const int next_link = cells.link[begin + next];
    const Pack<acc_t, kPack> next_kept = cells.kept(begin + next);
    visit(i, link, kept);
    i = next;
    link = next_link;
    kept = next_kept;
  }
}

// The largest tiles with which `blocks` blocks fit on a multiprocessor, because walking takes as long as the longest
// piece, however large the tile; but at least twice the longest piece.
inline Tiling choose_tiling(const Pieces& pieces, int64_t bytes_a_row, int blocks) {
  // The shared memory that the device reserves for each block, and the kernels' static shared memory.
  constexpr int64_t kReserved = 3 << 10;
  const int64_t room = shared_memory_limit() - kReserved, members = std::max(pieces.vertices - 1, 1);
  const int64_t wished = std::max<int64_t>((room / blocks - kReserved) / bytes_a_row, 2 * int64_t{pieces.most_members});
  const int64_t most_rows = std::max<int64_t>(std::min(wished, room / bytes_a_row) - pieces.most_members, 1);
  const int64_t rows = std::min(most_rows, members);
  // More than one tile and at most two remain for the rest, unless everything fits into one tile.
  const int64_t full = rows == members ? 1 : divide_up(members, rows) - 2, rest = members - full * rows;
  const int64_t tiles = full + (rest == 0 ? 0 : Tiling::kOfRest);
  const int64_t capacity = std::min<int64_t>(rows + pieces.most_members, pieces.vertices);
  return {
      static_cast<int>(rows),
      static_cast<int>(capacity),
      static_cast<int>(full),
      static_cast<int>(rest),
      static_cast<int>(tiles)};
}

}  // namespace grootvl::cuda
