// The tiles of a scan (piece_scan.cuh). A block has the members of some pieces that follow each other, times 8 packs of
// channels. All of it is first loaded into shared memory, row by row and without regard to the pieces, so that many
// loads are on their way at once; then groups of 8 lanes take a piece each, and wait for shared memory only. A lane
// has the same channels everywhere and no other lane touches them, so every sum has one order.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/pieces.cuh"

namespace grootvl::cuda {

// Lanes of a row in a tile, threads of a block, and the groups of lanes they make.
constexpr int kRowLanes = 8, kTileThreads = 256, kTileGroups = kTileThreads / kRowLanes;

// Blocks that a multiprocessor shall have room for, so that some load while others walk their pieces.
template <int kStreams>
constexpr int kTileBlocks = kStreams == 1 ? 3 : 2;

// Rows that a group has on their way at once, and half as many where no more are left.
template <typename acc_t>
constexpr int kRowsInFlight = sizeof(acc_t) == 4 ? 4 : 2;

// Which image and channels a lane has: blocks of the x axis are images x groups of channels. Lanes beyond the last
// channel read the first ones and write nothing.
template <int kPack>
struct LanePlace {
  int64_t image, channel;
  int lane, group;
  bool is_active;

  __device__ explicit LanePlace(int64_t channels) {
    const int64_t tiles = divide_up<int64_t>(channels, kRowLanes * kPack);
    lane = static_cast<int>(threadIdx.x) % kRowLanes;
    group = static_cast<int>(threadIdx.x) / kRowLanes;
    image = blockIdx.x / tiles;
    channel = (blockIdx.x % tiles * kRowLanes + lane) * kPack;
    is_active = channel < channels;
    channel = is_active ? channel : 0;
  }
};

// How the members of a tree's pieces are shared out: a tile has the pieces that begin in `rows` slots, and thereby at
// most `capacity` rows, the root of the first tile included.
struct Tiling {
  int rows, capacity, tiles;
};

// The pieces and slots of one tile. Its root, if it has one, comes after the members.
struct Tile {
  int first_piece, end_piece, first_slot, members, rows;
};

// For all threads of a block.
__device__ inline Tile find_tile(const TreePieces& tree, const Tiling& tiling, int index) {
  __shared__ int ends[2];
  // Nobody may still be reading what the tile before has left here.
  __syncthreads();
  if (threadIdx.x < 2) {
    ends[threadIdx.x] = tree.pieces;
  }
  __syncthreads();
  const int from = index * tiling.rows, to = from + tiling.rows;
  for (int piece = threadIdx.x; piece < tree.pieces; piece += blockDim.x) {
    const int first = tree.first[piece], before = piece == 0 ? -1 : tree.first[piece - 1];
    if (before < from && from <= first) {
      ends[0] = piece;
    }
    if (before < to && to <= first) {
      ends[1] = piece;
    }
  }
  __syncthreads();
  const int first_slot = tree.first[ends[0]], members = tree.first[ends[1]] - first_slot;
  return {ends[0], ends[1], first_slot, members, members + (index == 0)};
}

// The shared memory of a tile: for every row the value of each stream, what is kept of the decay, vertex and link.
template <typename acc_t, int kPack, int kStreams>
struct Cells {
  using Values = Pack<acc_t, kPack>;

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
    return (*this)(kStreams, row);
  }
};

// Loads kCount rows a group, from `first` on. `Input` has kStreams and, for rows and the channels of this lane:
//   Lane lane(channel)                   what it needs all the time
//   Raw load(row, channel, lane_in_row)  loads only, so that several can be on their way
//   use(raws, row_of, lane, channel, take)  take(j, values of the streams, what is kept) for each of several rows,
//                                           which row_of(j) tells
template <int kCount, typename acc_t, int kPack, typename Input>
__device__ void load_rows(
    const Input& input,
    const typename Input::Lane& of_lane,
    const LanePlace<kPack>& place,
    const TreePieces& tree,
    const Tile& tile,
    int first,
    int64_t first_row,
    const Cells<acc_t, kPack, Input::kStreams>& cells) {
  int vertices[kCount], links[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int row = min(first + j * kTileGroups, tile.rows - 1);
    const bool is_member = row < tile.members;
    vertices[j] = __ldg(is_member ? tree.vertex + tile.first_slot + row : tree.critical_vertex);
    links[j] = is_member ? __ldg(tree.link + tile.first_slot + row) : -1;
  }
  typename Input::Raw raws[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    raws[j] = input.load(first_row + vertices[j], place.channel, place.lane);
  }
  const auto row_of = [&](int j) { return first_row + vertices[j]; };
  input.use(
      raws,
      row_of,
      of_lane,
      place.channel,
      [&](int j, const Pack<acc_t, kPack>* values, const Pack<acc_t, kPack>& kept) {
        const int row = first + j * kTileGroups;
        if (row < tile.rows) {
#pragma unroll
          for (int s = 0; s < Input::kStreams; ++s) {
            cells(s, row) = values[s];
          }
          cells.kept(row) = kept;
          if (place.lane == 0) {
            cells.vertex[row] = vertices[j];
            cells.link[row] = links[j];
          }
        }
      });
}

template <typename acc_t, int kPack, typename Input>
__device__ void load_tile(
    const Input& input,
    const typename Input::Lane& of_lane,
    const LanePlace<kPack>& place,
    const TreePieces& tree,
    const Tile& tile,
    int64_t first_row,
    const Cells<acc_t, kPack, Input::kStreams>& cells) {
  constexpr int kMany = kRowsInFlight<acc_t>, kFew = kMany / 2, kWarpGroups = kWarpSize / kRowLanes;
  // All lanes of a warp do the same, since they exchange what they have loaded.
  const int in_warp = place.group % kWarpGroups;
  int first = place.group - in_warp;
  while (first < tile.rows) {
    if (first + kFew * kTileGroups < tile.rows) {
      load_rows<kMany>(input, of_lane, place, tree, tile, first + in_warp, first_row, cells);
      first += kMany * kTileGroups;
    } else {
      load_rows<kFew>(input, of_lane, place, tree, tile, first + in_warp, first_row, cells);
      first += kFew * kTileGroups;
    }
  }
  __syncthreads();
}

// Calls visit(row, link, decay) for the members of a piece, from the last up or from the first down. What comes next
// is read before, so that only the sums wait for each other.
template <bool kAscending, typename acc_t, int kPack, typename Input, typename Visit>
__device__ void for_each_member(
    const Input& input,
    const typename Input::Lane& of_lane,
    const Cells<acc_t, kPack, Input::kStreams>& cells,
    int begin,
    int members,
    const Visit& visit) {
  int i = kAscending ? 0 : members - 1, link = cells.link[begin + i];
  Pack<acc_t, kPack> kept = cells.kept(begin + i);
  for (int done = 0; done < members; ++done) {
    const int next = kAscending ? min(i + 1, members - 1) : max(i - 1, 0);
    const int next_link = cells.link[begin + next];
    const Pack<acc_t, kPack> next_kept = cells.kept(begin + next);
    visit(i, link, input.decay(kept, of_lane));
    i = next;
    link = next_link;
    kept = next_kept;
  }
}

// Tiles as large as the blocks of a multiprocessor have room for, since walking takes as long as the longest piece
// whatever a tile has beside it, but twice the longest piece; all tiles of a tree have about the same number of rows.
inline Tiling choose_tiling(const Pieces& pieces, int64_t bytes_a_row, int blocks) {
  // What the device keeps for itself of each block's shared memory.
  constexpr int64_t kReserved = 1 << 10;
  const int64_t room = shared_memory_limit() - kReserved, members = std::max(pieces.vertices - 1, 1);
  const int64_t wished = std::max<int64_t>((room / blocks - kReserved) / bytes_a_row, 2 * int64_t{pieces.most_members});
  const int64_t most_rows = std::max<int64_t>(std::min(wished, room / bytes_a_row) - pieces.most_members, 1);
  const int64_t tiles = divide_up(members, most_rows), rows = divide_up(members, tiles);
  const int64_t capacity = std::min<int64_t>(rows + pieces.most_members, pieces.vertices);
  return {static_cast<int>(rows), static_cast<int>(capacity), static_cast<int>(tiles)};
}

}  // namespace grootvl::cuda
