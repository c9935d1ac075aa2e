// Cuts trees into pieces, a block each. Inside, vertices go by their position in the order, so that the root is 0 and
// every parent is lower than its children.
#include "cuda/pieces.cuh"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "cuda/collectives.cuh"

namespace grootvl::cuda {

namespace {

constexpr int kThreads = 1024;
// Arrays of an entry a vertex that a block works on, in shared memory where that has room.
constexpr int kWorkArrays = 6;

// Calls `visit` with every index below count, spread over the threads of the block.
template <typename Visit>
__device__ void for_each_index(int count, const Visit& visit) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    visit(i);
  }
}

// Gives every index below count for which `value` is not zero the sum of the values before it: place(i, value, sum).
// Returns the sum of all.
template <typename Value, typename Place>
__device__ int number(int count, const Value& value, const Place& place) {
  int before = 0;
  for (int first = 0; first < count; first += blockDim.x) {
    const int i = first + static_cast<int>(threadIdx.x);
    const int own = i < count ? value(i) : 0;
    int total = 0;
    const int sum = before + exclusive_sum(own, total);
    if (own != 0) {
      place(i, own, sum);
    }
    before += total;
  }
  __syncthreads();
  return before;
}

__device__ int clamp_index(int index, int count) {
  return min(max(index, 0), count - 1);
}

// Number of vertices of every subtree, in `size`: after round k those at most 2^k - 1 edges below. The others are
// scratch memory.
__device__ void count_subtrees(
    int vertices, const int* parent, int*& size, int*& next_size, int*& ancestor, int*& next_ancestor) {
  for_each_index(vertices, [&](int i) {
    size[i] = 1;
    ancestor[i] = parent[i];
  });
  bool any = vertices > 1;
  while (__syncthreads_or(any)) {
    any = false;
    for_each_index(vertices, [&](int i) { next_size[i] = size[i]; });
    __syncthreads();
    for_each_index(vertices, [&](int i) {
      const int above = ancestor[i];
      int further = -1;
      if (above >= 0) {
        atomicAdd(next_size + above, size[i]);
        further = ancestor[above];
      }
      next_ancestor[i] = further;
      any |= further >= 0;
    });
    int* const old_size = size;
    size = next_size;
    next_size = old_size;
    int* const old_ancestor = ancestor;
    ancestor = next_ancestor;
    next_ancestor = old_ancestor;
  }
}

// Follows every entry to the end of its chain.
__device__ void follow(int count, int*& pointer, int*& next) {
  bool moved = true;
  while (__syncthreads_or(moved)) {
    moved = false;
    for_each_index(count, [&](int i) {
      const int target = pointer[i], further = pointer[target];
      next[i] = further;
      moved |= further != target;
    });
    int* const old = pointer;
    pointer = next;
    next = old;
  }
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) cut_kernel(
    const int* __restrict__ parents, const int* __restrict__ orders, int size_limit, int* workspace, Pieces pieces) {
  const int64_t image = blockIdx.x;
  const int vertices = pieces.vertices;
  const int* order = orders + image * vertices;
  const int* parent_vertex = parents + image * vertices;
  int* memory = kShared ? shared_memory_as<int>() : workspace + image * kWorkArrays * vertices;
  int *parent = memory, *a = memory + vertices, *b = a + vertices, *c = b + vertices, *d = c + vertices;
  int* critical = d + vertices;
  int *out_vertex = pieces.vertex_array(image, 0), *out_link = pieces.vertex_array(image, 1);
  int *out_first = pieces.vertex_array(image, 2), *out_top = pieces.vertex_array(image, 3);
  int *out_bottom = pieces.vertex_array(image, 4), *out_bottom_place = pieces.vertex_array(image, 5);
  int *out_critical_vertex = pieces.critical_array(image, 0), *out_critical_parent = pieces.critical_array(image, 1);

  const auto vertex_at = [&](int i) { return clamp_index(order[i], vertices); };
  for_each_index(vertices, [&](int i) { a[i] = i; });
  __syncthreads();
  for_each_index(vertices, [&](int i) { a[vertex_at(i)] = i; });
  __syncthreads();
  for_each_index(vertices, [&](int i) {
    const int above = a[clamp_index(parent_vertex[vertex_at(i)], vertices)];
    parent[i] = i == 0 ? -1 : min(above, i - 1);
  });
  __syncthreads();

  int *size = c, *free_size = d, *ancestor = a, *free_ancestor = b;
  count_subtrees(vertices, parent, size, free_size, ancestor, free_ancestor);

  // Multiples of the limit below the largest child, 0 for leaves; then the index of critical vertices, -1 for others.
  for_each_index(vertices, [&](int i) { critical[i] = 0; });
  __syncthreads();
  for_each_index(vertices, [&](int i) {
    if (i > 0) {
      atomicMax(critical + parent[i], divide_up(size[i], size_limit));
    }
  });
  __syncthreads();
  const int criticals = number(
      vertices,
      [&](int i) {
        const bool is_critical = i == 0 || (critical[i] > 0 && divide_up(size[i], size_limit) > critical[i]);
        critical[i] = -1;
        return static_cast<int>(is_critical);
      },
      [&](int i, int, int index) {
        critical[i] = index;
        out_critical_vertex[index] = vertex_at(i);
      });

  // The uppermost member of every vertex's piece.
  int *head = ancestor, *free_head = free_ancestor;
  for_each_index(vertices, [&](int i) { head[i] = i == 0 || critical[parent[i]] >= 0 ? i : parent[i]; });
  follow(vertices, head, free_head);

  int *piece_of_head = free_head, *members = size, *place = free_size;
  const int count = number(
      vertices,
      [&](int i) { return static_cast<int>(i > 0 && head[i] == i); },
      [&](int i, int, int piece) {
        piece_of_head[i] = piece;
        out_top[piece] = critical[parent[i]];
        out_bottom[piece] = -1;
        out_bottom_place[piece] = -1;
        members[piece] = 0;
      });
  for_each_index(vertices, [&](int i) {
    if (i > 0) {
      atomicAdd(members + piece_of_head[head[i]], 1);
    }
  });
  __syncthreads();
  number(
      count,
      [&](int piece) { return members[piece]; },
      [&](int piece, int, int before) {
        out_first[piece] = before;
        members[piece] = before;
      });
  if (threadIdx.x == 0) {
    out_first[count] = vertices - 1;
    out_critical_parent[0] = -1;
    pieces.counts[2 * image] = count;
    pieces.counts[2 * image + 1] = criticals;
  }
  // Members in any order first (in `out_vertex`, as positions), then by rank, so that parents come first.
  for_each_index(vertices, [&](int i) {
    if (i > 0) {
      out_vertex[atomicAdd(members + piece_of_head[head[i]], 1)] = i;
    }
  });
  __syncthreads();
  for_each_index(vertices, [&](int i) {
    if (i > 0) {
      const int piece = piece_of_head[head[i]];
      int rank = 0;
      for (int other = out_first[piece]; other < out_first[piece + 1]; ++other) {
        rank += out_vertex[other] < i;
      }
      place[i] = rank;
    }
  });
  __syncthreads();
  for_each_index(vertices, [&](int i) {
    if (i > 0) {
      const int piece = piece_of_head[head[i]];
      const int slot = out_first[piece] + place[i];
      out_vertex[slot] = vertex_at(i);
      out_link[slot] = head[i] == i ? -1 : place[parent[i]];
      if (critical[i] >= 0) {
        out_bottom[piece] = critical[i];
        out_bottom_place[piece] = place[i];
        out_critical_parent[critical[i]] = out_top[piece];
      }
    }
  });
}

// About the square root of the number of vertices, so that the pieces and the tree of critical vertices take alike
// long.
int choose_size(int64_t vertices) {
  int size = 16;
  while (size < 128 && static_cast<int64_t>(size) * size * 2 < vertices) {
    size *= 2;
  }
  return size;
}

}  // namespace

PieceTensors cut_trees(const at::Tensor& parent, const at::Tensor& order) {
  const int64_t batch = parent.size(0), vertices = parent.size(1);
  TORCH_CHECK_VALUE(vertices < int64_t{1} << 29, "trees must have less than 2^29 vertices, got ", vertices);
  const int size = choose_size(vertices);
  const int64_t most_criticals = 2 * divide_up<int64_t>(vertices, size);
  const auto options = parent.options();
  PieceTensors result{
      at::empty({batch, Pieces::kVertexArrays, vertices}, options),
      at::empty({batch, Pieces::kCriticalArrays, most_criticals}, options),
      at::empty({batch, 2}, options),
      {}};
  result.pieces = {
      static_cast<int>(vertices),
      size + 1,
      static_cast<int>(most_criticals),
      result.of_vertices.mutable_data_ptr<int>(),
      result.of_criticals.mutable_data_ptr<int>(),
      result.counts.mutable_data_ptr<int>()};
  const int64_t bytes = kWorkArrays * vertices * static_cast<int64_t>(sizeof(int));
  // A little is left for the shared variables of the kernel itself.
  const bool in_shared_memory = bytes + 1024 <= shared_memory_limit();
  const at::Tensor workspace = at::empty({in_shared_memory ? 0 : batch * kWorkArrays * vertices}, options);
  const int64_t threads = std::min<int64_t>(kThreads, divide_up<int64_t>(vertices, kWarpSize) * kWarpSize);
  launch(
      in_shared_memory ? cut_kernel<true> : cut_kernel<false>,
      dim3(static_cast<unsigned>(batch)),
      static_cast<int>(threads),
      in_shared_memory ? bytes : 0,
      parent.const_data_ptr<int>(),
      order.const_data_ptr<int>(),
      size,
      workspace.mutable_data_ptr<int>(),
      result.pieces);
  return result;
}

}  // namespace grootvl::cuda
