// CUDA kernels of the spanning tree: by one block for an image that fits into its shared memory, by many blocks for
// larger images. There is no synchronization with the host: the number of kernels depends on sizes only, and the
// kernels of unneeded rounds return at once.
#include "tree.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/boruvka.cuh"
#include "cuda/collectives.cuh"
#include "cuda/cut.cuh"
#include "cuda/launch.cuh"
#include "cuda/steps.cuh"
#include "cuda/tour.cuh"

namespace grootvl::cuda {

namespace {

constexpr int kTileSide = 32;
constexpr int kTileThreads = kTileSide * kTileSide;

// ---- one block per image ----

using SmallTour = Tour<unsigned, unsigned short>;

// Bytes of shared memory per vertex. The tour and the cut reuse the memory of the components.
constexpr int64_t kBytesOfVertex = TileMemory::kBytesOfVertex;
static_assert(kDirections * sizeof(unsigned) + 2 * sizeof(unsigned short) + sizeof(int) <= kBytesOfVertex);
static_assert(Cut::kArrays * sizeof(int) <= kBytesOfVertex);

// With kCut, cuts the tree as well.
template <bool kCut>
__global__ void __launch_bounds__(kTileThreads)
    tree_kernel(const float* __restrict__ weight, Grid grid, int root, int* parent, int* order, Cuts cuts) {
  const int64_t image = blockIdx.x;
  const int vertices = grid.vertices();
  TileMemory memory(shared_memory_as<unsigned char>(), vertices);
  grow_components(weight + image * grid.edges(), Tile{grid, 0, 0, grid.height, grid.width}, memory);

  const int arcs = kDirections * vertices;
  unsigned* const words = shared_memory_as<unsigned>();
  const SmallTour tour{
      grid,
      root,
      memory.links,
      words,
      reinterpret_cast<unsigned short*>(words + arcs),
      parent + image * vertices,
      order + image * vertices};
  for_each_index(arcs, [&](int arc) { tour.start(arc, 1); });
  bool more = true;
  while (__syncthreads_or(more)) {
    more = false;
    for_each_index(arcs, [&](int arc) { more |= tour.jump(arc, 4); });
  }
  for_each_index(vertices, [&](int v) { tour.root_vertex(v); });
  __syncthreads();
  number_in_block<OrderVertices>(tour, tour.arcs());
  if constexpr (kCut) {
    cut_in_block(cuts.of(image, shared_memory_as<int>()));
  }
}

// ---- many blocks per image ----

using LargeTour = Tour<unsigned long long, int>;

// Jumps per step of a tour. A step multiplies the distance of an arc by at least kJumps + 1.
constexpr int kJumps = 15;

struct StartTour {
  static __device__ void run(const LargeTour& tour, int arc) {
    tour.start(arc, kJumps + 1);
  }
};

struct JumpTour {
  static __device__ void run(const LargeTour& tour, int arc) {
    tour.jump(arc, kJumps);
  }
};

struct RootVertices {
  static __device__ void run(const LargeTour& tour, int vertex) {
    tour.root_vertex(vertex);
  }
};

// The arrays of all images, with an entry per vertex, or four for the words of the tour.
struct LargeTrees {
  static constexpr int64_t kBytesOfVertex = (2 + kDirections) * sizeof(Key) + 3 * sizeof(int);

  Grid grid;
  int root;
  const float* weight;
  Key *even_least, *odd_least, *words;
  int *component, *leader, *links;
  int *parent, *order;

  __device__ Components components(int64_t image, int round) const {
    const int64_t first = image * grid.vertices();
    return {
        grid,
        weight + image * grid.edges(),
        (round % 2 == 0 ? even_least : odd_least) + first,
        (round % 2 == 0 ? odd_least : even_least) + first,
        component + first,
        leader + first,
        links + first};
  }
  __device__ LargeTour operator[](int64_t image) const {
    const int64_t first = image * grid.vertices();
    // The vertices of the tour, two entries per vertex, reuse the memory of the least edges.
    return {
        grid,
        root,
        links + first,
        words + kDirections * first,
        reinterpret_cast<int*>(even_least + first),
        parent + first,
        order + first};
  }
};

// The grid is images x tiles, with a thread per vertex.
__global__ void __launch_bounds__(kTileThreads) tile_kernel(LargeTrees trees, int* active, int rounds) {
  const Grid grid = trees.grid;
  const int tiles_in_row = divide_up(grid.width, kTileSide);
  const int tiles = tiles_in_row * divide_up(grid.height, kTileSide);
  const int64_t image = blockIdx.x / tiles;
  const int row = static_cast<int>(blockIdx.x % tiles) / tiles_in_row * kTileSide;
  const int column = static_cast<int>(blockIdx.x % tiles) % tiles_in_row * kTileSide;
  const Tile tile{grid, row, column, min(kTileSide, grid.height - row), min(kTileSide, grid.width - column)};
  TileMemory memory(shared_memory_as<unsigned char>(), tile.vertices());
  const Components all = trees.components(image, 0);
  grow_components(all.weight, tile, memory);
  for_each_index(tile.vertices(), [&](int i) {
    const int vertex = tile.vertex(i);
    all.least[vertex] = kNoEdge;
    all.component[vertex] = tile.vertex(memory.component[i]);
    all.leader[vertex] = vertex;
    all.links[vertex] = memory.links[i];
  });
  if (blockIdx.x == 0) {
    for_each_index(rounds, [&](int round) { active[round] = 0; });
  }
}

__global__ void __launch_bounds__(kThreadsOfMany) offer_kernel(LargeTrees trees, Parts parts, int round, int* active) {
  if (round > 0 && active[round - 1] == 0) {
    return;
  }
  const Components all = trees.components(parts.image(), round);
  bool any = false;
  for (int v = parts.begin() + static_cast<int>(threadIdx.x); v < parts.end(); v += blockDim.x) {
    any |= offer_edges(all, v);
  }
  if (__syncthreads_or(any) && threadIdx.x == 0) {
    store_relaxed(active + round, 1);
  }
}

__global__ void __launch_bounds__(kThreadsOfMany)
    join_kernel(LargeTrees trees, Parts parts, int round, const int* active) {
  if (active[round] == 0) {
    return;
  }
  const Components all = trees.components(parts.image(), round);
  for (int v = parts.begin() + static_cast<int>(threadIdx.x); v < parts.end(); v += blockDim.x) {
    join(all, v);
  }
}

// Upper bound on the components that tiles leave: each has a vertex at the border to another tile.
int64_t most_components(int64_t height, int64_t width) {
  const auto lines = [](int64_t extent) { return 2 * (divide_up<int64_t>(extent, kTileSide) - 1); };
  const int64_t rows = lines(height), columns = lines(width);
  return std::max<int64_t>(1, rows * width + columns * height - rows * columns);
}

void grow_large_trees(const at::Tensor& weight, Grid grid, int root, at::Tensor& parent, at::Tensor& order) {
  const int64_t batch = weight.size(0), vertices = grid.vertices(), all = batch * vertices;
  const int rounds = log_up(most_components(grid.height, grid.width));
  const Parts parts = Parts::of(vertices), tour_parts = Parts::of(2 * vertices - 2);
  const auto bytes = weight.options().dtype(at::kByte), integers = weight.options().dtype(at::kInt);
  const at::Tensor workspace = at::empty({all * LargeTrees::kBytesOfVertex}, bytes);
  const at::Tensor active = at::empty({std::max(rounds, 1)}, integers);
  const at::Tensor sums = at::empty({batch * tour_parts.parts}, integers);
  Key* const keys = reinterpret_cast<Key*>(workspace.mutable_data_ptr<unsigned char>());
  int* const numbers = reinterpret_cast<int*>(keys + (2 + kDirections) * all);
  const LargeTrees trees{
      grid,
      root,
      weight.const_data_ptr<float>(),
      keys,
      keys + all,
      keys + 2 * all,
      numbers,
      numbers + all,
      numbers + 2 * all,
      parent.mutable_data_ptr<int>(),
      order.mutable_data_ptr<int>()};
  int* const flags = active.mutable_data_ptr<int>();

  const int64_t tiles = divide_up(grid.height, kTileSide) * int64_t{divide_up(grid.width, kTileSide)};
  const int64_t of_tile = std::min(grid.height, kTileSide) * int64_t{std::min(grid.width, kTileSide)};
  launch(
      tile_kernel,
      blocks_in_row(batch * tiles),
      static_cast<int>(divide_up<int64_t>(of_tile, kWarpSize) * kWarpSize),
      of_tile * TileMemory::kBytesOfVertex,
      trees,
      flags,
      rounds);
  const dim3 blocks = blocks_in_row(batch * parts.parts);
  for (int round = 0; round < rounds; ++round) {
    launch(offer_kernel, blocks, kThreadsOfMany, 0, trees, parts, round, flags);
    launch(join_kernel, blocks, kThreadsOfMany, 0, trees, parts, round, flags);
  }
  launch_step<StartTour>(trees, batch, kDirections * vertices);
  for (int step = 1; step < log_up(2 * vertices - 2, kJumps + 1); ++step) {
    launch_step<JumpTour>(trees, batch, kDirections * vertices);
  }
  launch_step<RootVertices>(trees, batch, vertices);
  launch_number<OrderVertices>(trees, batch, 2 * vertices - 2, sums.mutable_data_ptr<int>());
}

struct Trees {
  at::Tensor parent, order, cut;
};

// The cut is undefined without with_cut.
Trees make_trees(const at::Tensor& edge_weight, int64_t height, int64_t width, int64_t root, bool with_cut) {
  check_edge_weight(edge_weight, height, width, root);
  const c10::cuda::CUDAGuard guard(edge_weight.device());
  const at::Tensor weight = edge_weight.contiguous();
  const int64_t batch = weight.size(0), vertices = height * width;
  const auto integers = weight.options().dtype(at::kInt);
  Trees trees{at::empty({batch, vertices}, integers), at::empty({batch, vertices}, integers), {}};
  if (batch == 0) {
    trees.cut = with_cut ? allocate_pieces(batch, vertices, integers).memory : at::Tensor();
    return trees;
  }
  const Grid grid{static_cast<int>(height), static_cast<int>(width)};
  const int64_t bytes = vertices * kBytesOfVertex;
  const auto kernel = with_cut ? tree_kernel<true> : tree_kernel<false>;
  if (vertices > SmallTour::kMostVertices || bytes > dynamic_shared_memory_limit(kernel)) {
    grow_large_trees(weight, grid, static_cast<int>(root), trees.parent, trees.order);
    if (with_cut) {
      trees.cut = cut_trees(trees.parent, trees.order, c10::nullopt).memory;
    }
    return trees;
  }
  PieceTensors pieces;
  if (with_cut) {
    pieces = allocate_pieces(batch, vertices, integers);
    trees.cut = pieces.memory;
  }
  int* const parents = trees.parent.mutable_data_ptr<int>();
  int* const orders = trees.order.mutable_data_ptr<int>();
  launch(
      kernel,
      blocks_in_row(batch),
      static_cast<int>(std::min<int64_t>(kTileThreads, divide_up<int64_t>(vertices, kWarpSize) * kWarpSize)),
      bytes,
      weight.const_data_ptr<float>(),
      grid,
      static_cast<int>(root),
      parents,
      orders,
      Cuts{pieces.pieces, orders, parents});
  return trees;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> grid_tree(
    const at::Tensor& edge_weight, int64_t height, int64_t width, int64_t root) {
  const Trees trees = make_trees(edge_weight, height, width, root, false);
  return {trees.parent, trees.order};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> grid_tree_and_cut(
    const at::Tensor& edge_weight, int64_t height, int64_t width, int64_t root) {
  const Trees trees = make_trees(edge_weight, height, width, root, true);
  return {trees.parent, trees.order, trees.cut};
}

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("grid_tree", &grid_tree);
  m.impl("grid_tree_and_cut", &grid_tree_and_cut);
}

}  // namespace grootvl::cuda
