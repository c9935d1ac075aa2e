// CUDA kernels of the edge weights and the spanning tree. A warp makes the edge weights of a run of vertices; a block
// makes the tree of an image, so that nothing waits for the host. Every result has one order of computation.
#include "tree.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "cuda/collectives.cuh"
#include "cuda/launch.cuh"

namespace grootvl::cuda {

namespace {

// ---- edge weights ----

constexpr int kColumnsInBlock = 8;
// Rows that a warp goes down; the norm of the first of them is computed twice.
constexpr int kRowsInRun = 8;

template <typename scalar_t, int kWidth>
struct alignas(sizeof(scalar_t) * kWidth) Pack {
  scalar_t value[kWidth];
};

template <Metric metric, typename acc_t>
__device__ acc_t term(acc_t a, acc_t b) {
  if constexpr (metric == Metric::kCosine) {
    return a * b;
  } else if constexpr (metric == Metric::kEuclidean) {
    return (a - b) * (a - b);
  } else {
    return a < b ? b - a : a - b;
  }
}

// What a vertex adds up to with the ones to its right and below, and the squares of the norms of these two.
template <typename acc_t>
struct Sums {
  acc_t right, below, square_right, square_below;
};

template <Metric metric, int kPack, typename scalar_t, typename acc_t>
__device__ Sums<acc_t> sum_terms(
    const scalar_t* __restrict__ own,
    const scalar_t* __restrict__ right,
    const scalar_t* __restrict__ below,
    int64_t channels) {
  using Values = Pack<scalar_t, kPack>;
  Sums<acc_t> sums = {};
  for (int64_t c = lane_index() * kPack; c < channels; c += kWarpSize * kPack) {
    const Values of_own = *reinterpret_cast<const Values*>(own + c);
    const Values of_right = *reinterpret_cast<const Values*>(right + c);
    const Values of_below = *reinterpret_cast<const Values*>(below + c);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const acc_t f = static_cast<acc_t>(of_own.value[i]);
      const acc_t r = static_cast<acc_t>(of_right.value[i]);
      const acc_t b = static_cast<acc_t>(of_below.value[i]);
      sums.right += term<metric>(f, r);
      sums.below += term<metric>(f, b);
      if constexpr (metric == Metric::kCosine) {
        sums.square_right += r * r;
        sums.square_below += b * b;
      }
    }
  }
  warp_sums(sums.right, sums.below, sums.square_right, sums.square_below);
  return sums;
}

template <typename acc_t>
__device__ acc_t norm(acc_t square) {
  const acc_t root = sqrt(square);
  const acc_t least = static_cast<acc_t>(1e-8);
  // Written so that NaN stays.
  return root < least ? least : root;
}

// The weight of an edge; `first` and `second` are the norms of its ends (cosine only).
template <Metric metric, typename acc_t>
__device__ float to_weight(acc_t sum, acc_t first, acc_t second, bool log) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kOverflowing = 89.0f;
  acc_t exponent = sum;
  if constexpr (metric == Metric::kCosine) {
    exponent = -exponent / (first * second);
  }
  const float x = static_cast<float>(exponent);
  const float weight = log ? x : expf(x < kOverflowing ? x : kOverflowing);
  return x <= kLargest && weight <= kLargest ? weight : kLargest;
}

// Blocks: images x runs of rows x groups of columns. A warp goes down its column, row by row.
template <Metric metric, int kPack, typename scalar_t, typename acc_t>
__global__ void edge_weight_kernel(
    const scalar_t* __restrict__ feature,
    int64_t channels,
    int height,
    int width,
    bool log,
    float* __restrict__ weight) {
  const int groups = divide_up(width, kColumnsInBlock), runs = divide_up(height, kRowsInRun);
  const int group = blockIdx.x % groups, run = blockIdx.x / groups % runs;
  const int64_t image = blockIdx.x / groups / runs;
  const int column = group * kColumnsInBlock + warp_index();
  if (column >= width) {
    return;
  }
  const int64_t vertices = static_cast<int64_t>(height) * width;
  const int64_t num_vertical = vertices - width;
  float* vertical = weight + image * (num_vertical + vertices - height);
  float* horizontal = vertical + num_vertical;
  const scalar_t* features = feature + image * vertices * channels;
  const auto row_of = [&](int64_t vertex) { return features + vertex * channels; };

  const int begin = run * kRowsInRun, end = min(begin + kRowsInRun, height);
  const scalar_t* own = row_of(static_cast<int64_t>(begin) * width + column);
  acc_t own_norm = 0;
  if constexpr (metric == Metric::kCosine) {
    own_norm = norm(sum_terms<metric, kPack, scalar_t, acc_t>(own, own, own, channels).square_below);
  }
  for (int r = begin; r < end; ++r) {
    const int64_t v = static_cast<int64_t>(r) * width + column;
    const bool has_right = column + 1 < width, has_below = r + 1 < height;
    const scalar_t* below = has_below ? row_of(v + width) : own;
    const Sums<acc_t> sums =
        sum_terms<metric, kPack, scalar_t, acc_t>(own, has_right ? row_of(v + 1) : own, below, channels);
    const acc_t below_norm = norm(sums.square_below);
    if (lane_index() == 0) {
      if (has_right) {
        horizontal[v - r] = to_weight<metric>(sums.right, own_norm, norm(sums.square_right), log);
      }
      if (has_below) {
        vertical[v] = to_weight<metric>(sums.below, own_norm, below_norm, log);
      }
    }
    own = below;
    own_norm = below_norm;
  }
}

template <Metric metric, typename scalar_t>
void launch_edge_weight(const at::Tensor& rows, bool log, at::Tensor& weight) {
  using acc_t = at::opmath_type<scalar_t>;
  constexpr int kPack = 16 / sizeof(scalar_t);
  const int64_t batch = rows.size(0), channels = rows.size(1), height = rows.size(2), width = rows.size(3);
  const scalar_t* features = rows.const_data_ptr<scalar_t>();
  const bool packed = channels % kPack == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0;
  const int64_t blocks = batch * divide_up<int64_t>(height, kRowsInRun) * divide_up<int64_t>(width, kColumnsInBlock);
  TORCH_CHECK_VALUE(
      blocks <= std::numeric_limits<int>::max(), "feature has too many vertices for one call, got ", rows.sizes());
  launch(
      packed ? edge_weight_kernel<metric, kPack, scalar_t, acc_t> : edge_weight_kernel<metric, 1, scalar_t, acc_t>,
      dim3(static_cast<unsigned>(blocks)),
      kColumnsInBlock * kWarpSize,
      0,
      features,
      channels,
      static_cast<int>(height),
      static_cast<int>(width),
      log,
      weight.mutable_data_ptr<float>());
}

// ---- spanning tree ----

using Key = unsigned long long;
constexpr Key kNoEdge = ~Key{0};
constexpr int kTreeThreads = 1024;

// Directions from a vertex, ascending in the index of the edge that they follow; bits of a vertex's links.
enum Direction : int { kUp, kDown, kLeft, kRight, kDirections };

struct Grid {
  int height, width;

  __device__ int vertices() const {
    return height * width;
  }
  __device__ int num_vertical() const {
    return (height - 1) * width;
  }
  __device__ bool has_below(int v) const {
    return v < num_vertical();
  }
  __device__ bool has_right(int v) const {
    return v % width + 1 < width;
  }
  // Index of the edge from a vertex to the one to its right.
  __device__ int horizontal_edge(int v) const {
    return num_vertical() + v - v / width;
  }
  // Lower end of an edge.
  __device__ int lower_end(int edge) const {
    const int horizontal = edge - num_vertical();
    return horizontal < 0 ? edge : horizontal + horizontal / (width - 1);
  }
  __device__ int higher_end(int edge) const {
    return lower_end(edge) + (edge < num_vertical() ? width : 1);
  }
  __device__ int step(int direction) const {
    return direction == kUp ? -width : direction == kDown ? width : direction == kLeft ? -1 : 1;
  }
};

// What a block needs for one image, in shared memory where that has room: five arrays of an entry a vertex.
struct TreeMemory {
  static constexpr int64_t kBytesOfVertex = sizeof(Key) + 4 * sizeof(int);

  __device__ TreeMemory(unsigned char* memory, int vertices)
      : least(reinterpret_cast<Key*>(memory)),
        component(reinterpret_cast<int*>(least + vertices)),
        leader(component + vertices),
        next(leader + vertices),
        links(next + vertices) {}

  Key* least;
  int *component, *leader, *next, *links;
};

// Orders edges by weight, then by index.
__device__ Key to_key(float weight, int edge) {
  // Adding zero makes -0 and 0 the same.
  const unsigned bits = __float_as_uint(weight + 0.0f);
  const unsigned ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ascending) << 32 | static_cast<unsigned>(edge);
}

__device__ void offer(Key* least, Key key) {
  // Looking first spares most of the atomics when few components are left. An old value only costs one more atomic.
  if (key < *const_cast<volatile Key*>(least)) {
    atomicMin(least, key);
  }
}

// Every component's least edge to another one. Returns whether there is any, to all threads.
__device__ bool choose_edges(const float* __restrict__ weight, Grid grid, const TreeMemory& memory) {
  for (int v = threadIdx.x; v < grid.vertices(); v += blockDim.x) {
    memory.least[v] = kNoEdge;
  }
  __syncthreads();
  bool any = false;
  const auto consider = [&](int u, int v, int edge) {
    const int of_u = memory.component[u], of_v = memory.component[v];
    if (of_u != of_v) {
      const Key key = to_key(weight[edge], edge);
      offer(memory.least + of_u, key);
      offer(memory.least + of_v, key);
      any = true;
    }
  };
  for (int v = threadIdx.x; v < grid.vertices(); v += blockDim.x) {
    if (grid.has_below(v)) {
      consider(v, v + grid.width, v);
    }
    if (grid.has_right(v)) {
      consider(v, v + 1, grid.horizontal_edge(v));
    }
  }
  return __syncthreads_or(any);
}

// Takes the chosen edges into the tree and points every component to the one that it joins.
__device__ void join(Grid grid, const TreeMemory& memory) {
  for (int v = threadIdx.x; v < grid.vertices(); v += blockDim.x) {
    const int own = memory.component[v];
    if (own != v) {
      memory.leader[v] = own;
      continue;
    }
    const Key key = memory.least[v];
    const int edge = static_cast<int>(key & 0xffffffff);
    const int low = grid.lower_end(edge), high = grid.higher_end(edge);
    const int other = memory.component[low] == v ? memory.component[high] : memory.component[low];
    // Two components that chose the same edge: one of them leads, and takes the edge.
    const bool mutual = memory.least[other] == key;
    memory.leader[v] = mutual && v < other ? v : other;
    if (!mutual || v < other) {
      const bool vertical = edge < grid.num_vertical();
      atomicOr(memory.links + low, 1 << (vertical ? kDown : kRight));
      atomicOr(memory.links + high, 1 << (vertical ? kUp : kLeft));
    }
  }
  __syncthreads();
}

// Follows the leaders to the last of each chain: the new components.
__device__ void merge(int vertices, TreeMemory& memory) {
  bool moved = true;
  while (__syncthreads_or(moved)) {
    moved = false;
    for (int v = threadIdx.x; v < vertices; v += blockDim.x) {
      const int leader = memory.leader[v], further = memory.leader[leader];
      memory.next[v] = further;
      moved |= further != leader;
    }
    int* const leader = memory.leader;
    memory.leader = memory.next;
    memory.next = leader;
  }
  int* const component = memory.component;
  memory.component = memory.leader;
  memory.leader = component;
}

// The vertices level by level from the root, by one warp: `order` and `parent`. Uses up the links.
__device__ void walk(Grid grid, int root, int* links, int* order, int* parent) {
  const unsigned lanes_before = (1u << lane_index()) - 1;
  if (lane_index() == 0) {
    order[0] = root;
    parent[root] = root;
  }
  __syncwarp();
  int begin = 0, end = 1;
  while (begin < end) {
    int tail = end;
    for (int first = begin; first < end; first += kWarpSize) {
      const int i = first + lane_index();
      const int v = i < end ? order[i] : 0;
      const int open = i < end ? links[v] : 0;
      const int children = __popc(open);
      const unsigned ones = __ballot_sync(kAllLanes, children & 1);
      const unsigned twos = __ballot_sync(kAllLanes, children & 2);
      const unsigned fours = __ballot_sync(kAllLanes, children & 4);
      int place =
          tail + __popc(ones & lanes_before) + 2 * __popc(twos & lanes_before) + 4 * __popc(fours & lanes_before);
#pragma unroll
      for (int direction = 0; direction < kDirections; ++direction) {
        if (open >> direction & 1) {
          const int child = v + grid.step(direction);
          order[place++] = child;
          parent[child] = v;
          // Opposite directions differ in their lowest bit.
          links[child] &= ~(1 << (direction ^ 1));
        }
      }
      tail += __popc(ones) + 2 * __popc(twos) + 4 * __popc(fours);
    }
    __syncwarp();
    begin = end;
    end = tail;
  }
}

// One block an image. With kShared the memory is the block's shared memory, else its part of `workspace`.
template <bool kShared>
__global__ void __launch_bounds__(kTreeThreads) tree_kernel(
    const float* __restrict__ weight,
    Grid grid,
    int root,
    unsigned char* workspace,
    int* __restrict__ parent,
    int* __restrict__ order) {
  const int64_t image = blockIdx.x;
  const int vertices = grid.vertices();
  const int64_t num_edges = static_cast<int64_t>(2) * vertices - grid.height - grid.width;
  weight += image * num_edges;
  TreeMemory memory(
      kShared ? shared_memory_as<unsigned char>() : workspace + image * vertices * TreeMemory::kBytesOfVertex,
      vertices);
  for (int v = threadIdx.x; v < vertices; v += blockDim.x) {
    memory.component[v] = v;
    memory.links[v] = 0;
  }
  __syncthreads();
  while (choose_edges(weight, grid, memory)) {
    join(grid, memory);
    merge(vertices, memory);
  }
  int* const queue = memory.leader;
  int* const parents = memory.next;
  if (warp_index() == 0) {
    walk(grid, root, memory.links, queue, parents);
  }
  __syncthreads();
  for (int v = threadIdx.x; v < vertices; v += blockDim.x) {
    parent[image * vertices + v] = parents[v];
    order[image * vertices + v] = queue[v];
  }
}

}  // namespace

at::Tensor grid_edge_weight(const at::Tensor& feature, c10::string_view metric_name, bool log) {
  const Metric metric = parse_metric(metric_name);
  check_feature(feature);
  const c10::cuda::CUDAGuard guard(feature.device());
  const at::Tensor rows = feature.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor weight =
      at::empty({feature.size(0), count_edges(feature.size(2), feature.size(3))}, feature.options().dtype(at::kFloat));
  if (weight.numel() == 0) {
    return weight;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, feature.scalar_type(), "grid_edge_weight", [&] {
    switch (metric) {
      case Metric::kCosine:
        return launch_edge_weight<Metric::kCosine, scalar_t>(rows, log, weight);
      case Metric::kEuclidean:
        return launch_edge_weight<Metric::kEuclidean, scalar_t>(rows, log, weight);
      case Metric::kManhattan:
        return launch_edge_weight<Metric::kManhattan, scalar_t>(rows, log, weight);
    }
  });
  return weight;
}

std::tuple<at::Tensor, at::Tensor> grid_tree(
    const at::Tensor& edge_weight, int64_t height, int64_t width, int64_t root) {
  check_edge_weight(edge_weight, height, width, root);
  const c10::cuda::CUDAGuard guard(edge_weight.device());
  const at::Tensor weight = edge_weight.contiguous();
  const int64_t batch = weight.size(0), vertices = height * width;
  at::Tensor parent = at::empty({batch, vertices}, weight.options().dtype(at::kInt));
  at::Tensor order = at::empty({batch, vertices}, weight.options().dtype(at::kInt));
  if (batch == 0) {
    return {parent, order};
  }
  const int64_t bytes = vertices * TreeMemory::kBytesOfVertex;
  // A little is left for the shared variables of the kernel itself.
  const bool in_shared_memory = bytes + 1024 <= shared_memory_limit();
  const at::Tensor workspace = at::empty({in_shared_memory ? 0 : batch * bytes}, weight.options().dtype(at::kByte));
  const int64_t threads = std::min<int64_t>(kTreeThreads, divide_up<int64_t>(vertices, kWarpSize) * kWarpSize);
  launch(
      in_shared_memory ? tree_kernel<true> : tree_kernel<false>,
      dim3(static_cast<unsigned>(batch)),
      static_cast<int>(threads),
      in_shared_memory ? bytes : 0,
      weight.const_data_ptr<float>(),
      Grid{static_cast<int>(height), static_cast<int>(width)},
      static_cast<int>(root),
      workspace.mutable_data_ptr<unsigned char>(),
      parent.mutable_data_ptr<int>(),
      order.mutable_data_ptr<int>());
  return {parent, order};
}

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("grid_edge_weight", &grid_edge_weight);
  m.impl("grid_tree", &grid_tree);
}

}  // namespace grootvl::cuda
