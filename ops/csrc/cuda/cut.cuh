// The steps (steps.cuh) that cut a tree into pieces. Vertices are numbered by their position in the order: the root is
// 0, parents precede their children.
#pragma once

#include <limits>

#include "cuda/atomics.cuh"
#include "cuda/collectives.cuh"
#include "cuda/pieces.cuh"
#include "cuda/steps.cuh"

namespace grootvl::cuda {

// The most members of a piece, so that a warp can hold them in its registers.
constexpr int kMostMembers = 129;
constexpr int kMembersOfLane = divide_up(kMostMembers, kWarpSize);
// Jumps per step towards the head of a piece. A step multiplies the distance by at least kHeadJumps + 1.
constexpr int kHeadJumps = 15, kHeadSteps = log_up(kMostMembers, kHeadJumps + 1);

__device__ inline int clamp_index(int index, int count) {
  return min(max(index, 0), count - 1);
}

// One tree, the arrays of the steps, and the results.
struct Cut {
  // The number of working arrays with an entry per vertex.
  static constexpr int kArrays = 6;

  Pieces pieces;
  int64_t image;
  const int *order, *parent_vertex;
  int* memory;
  // The round of pointer doubling that counts subtrees; selects the arrays of sizes and ancestors before it.
  int round;

  __device__ int vertices() const {
    return pieces.vertices;
  }
  __device__ int vertex_at(int i) const {
    return clamp_index(order[i], vertices());
  }
  __device__ int multiples(int i) const {
    return divide_up(size()[i], pieces.size_limit());
  }
  __device__ int* array(int number) const {
    return memory + static_cast<int64_t>(number) * vertices();
  }

  // -1 for the root.
  __device__ int* parent() const {
    return array(0);
  }
  __device__ int* size() const {
    return array(1 + round % 3);
  }
  __device__ int* next_size() const {
    return array(1 + (round + 1) % 3);
  }
  __device__ int* last_size() const {
    return array(1 + (round + 2) % 3);
  }
  __device__ int* ancestor() const {
    return array(4 + round % 2);
  }
  __device__ int* next_ancestor() const {
    return array(4 + (round + 1) % 2);
  }
  // The same arrays, with other uses before and after the doublings.
  __device__ int* position() const {
    return last_size();
  }
  // Multiples of the limit below the largest child, 0 for leaves.
  __device__ int* multiple() const {
    return next_size();
  }
  // Index among the critical vertices, -1 for others.
  __device__ int* critical() const {
    return last_size();
  }
  // The uppermost member of a vertex's piece.
  __device__ int* head() const {
    return ancestor();
  }
  // Of heads: the members of the piece, then the piece.
  __device__ int* members() const {
    return next_ancestor();
  }
  __device__ int* piece() const {
    return next_ancestor();
  }
  // The heads of the pieces; afterwards, of every vertex, its place in its piece.
  __device__ int* heads() const {
    return next_size();
  }
  __device__ int* place() const {
    return next_size();
  }
  // Of pieces: where the next member goes.
  __device__ int* slot() const {
    return size();
  }

  __device__ int* out_vertex() const {
    return pieces.vertex_array(image, 0);
  }
  __device__ int* out_link() const {
    return pieces.vertex_array(image, 1);
  }
  __device__ int* out_first() const {
    return pieces.vertex_array(image, 2);
  }
  __device__ int* out_top() const {
    return pieces.vertex_array(image, 3);
  }
  __device__ int* out_bottom() const {
    return pieces.vertex_array(image, 4);
  }
  __device__ int* out_bottom_place() const {
    return pieces.vertex_array(image, 5);
  }
  __device__ int* out_critical_vertex() const {
    return pieces.critical_array(image, 0);
  }
  __device__ int* out_critical_parent() const {
    return pieces.critical_array(image, 1);
  }
  __device__ int& out_pieces() const {
    return pieces.counts(image)[0];
  }
  __device__ int& out_criticals() const {
    return pieces.counts(image)[1];
  }
};

struct Cuts {
  Pieces pieces;
  const int *orders, *parents;
  // (B, Cut::kArrays, L), if not in shared memory.
  int* workspace = nullptr;
  int round = 0;

  __device__ Cut of(int64_t image, int* memory) const {
    const int64_t first = image * pieces.vertices;
    return {pieces, image, orders + first, parents + first, memory, round};
  }
  __device__ Cut operator[](int64_t image) const {
    return of(image, workspace + image * Cut::kArrays * pieces.vertices);
  }
};

struct FindPositions {
  static __device__ void run(const Cut& cut, int i) {
    store_relaxed(cut.position() + cut.vertex_at(i), i);
    cut.pieces.clear(cut.image, i);
  }
};

// Also for invalid trees, the root's parent is -1 and that of any other vertex is lower than the vertex.
struct FindParents {
  static __device__ void run(const Cut& cut, int i) {
    const int above = cut.position()[clamp_index(cut.parent_vertex[cut.vertex_at(i)], cut.vertices())];
    cut.parent()[i] = i == 0 ? -1 : max(min(above, i - 1), 0);
    cut.ancestor()[i] = cut.parent()[i];
    cut.size()[i] = 1;
    cut.next_size()[i] = 0;
  }
};

// After round k, the descendants within 2^k - 1 edges are counted. Threads add to the next sizes, which no thread reads
// in this round, and reset the previous sizes for the round after.
struct CountSubtrees {
  static __device__ void run(const Cut& cut, int i) {
    const int size = cut.size()[i], above = cut.ancestor()[i];
    atomicAdd(cut.next_size() + i, size);
    if (above >= 0) {
      atomicAdd(cut.next_size() + above, size);
    }
    cut.next_ancestor()[i] = above >= 0 ? cut.ancestor()[above] : -1;
    cut.last_size()[i] = 0;
  }
};

struct CompareChildren {
  static __device__ void run(const Cut& cut, int i) {
    if (i > 0) {
      atomicMax(cut.multiple() + cut.parent()[i], cut.multiples(i));
    }
  }
};

struct NumberCriticals {
  static __device__ int value(const Cut& cut, int i) {
    const int below = cut.multiple()[i];
    return i == 0 || (below > 0 && cut.multiples(i) > below);
  }
  static __device__ void place(const Cut& cut, int i, int is_critical, int index) {
    cut.critical()[i] = is_critical ? index : -1;
    if (is_critical) {
      cut.out_critical_vertex()[index] = cut.vertex_at(i);
    }
  }
  static __device__ void total(const Cut& cut, int criticals) {
    cut.out_criticals() = criticals;
  }
};

struct StartHeads {
  static __device__ void run(const Cut& cut, int i) {
    const int above = cut.parent()[i];
    cut.head()[i] = i == 0 || cut.critical()[above] >= 0 ? i : above;
    cut.members()[i] = 0;
  }
};

// Other threads may jump concurrently: every entry leads to the same head.
struct FindHeads {
  static __device__ int run(const Cut& cut, int i) {
    int head = load_relaxed(cut.head() + i);
    for (int jump = 0; jump < kHeadJumps; ++jump) {
      const int further = load_relaxed(cut.head() + head);
      if (further == head) {
        break;
      }
      head = further;
    }
    store_relaxed(cut.head() + i, head);
    return head;
  }
};

// The last of these steps; it reaches the heads.
struct CountMembers {
  static __device__ void run(const Cut& cut, int i) {
    const int head = FindHeads::run(cut, i);
    if (i > 0) {
      atomicAdd(cut.members() + head, 1);
    }
  }
};

struct ListHeads {
  static __device__ int value(const Cut& cut, int i) {
    return i > 0 && cut.head()[i] == i;
  }
  static __device__ void place(const Cut& cut, int i, int is_head, int index) {
    if (is_head) {
      cut.heads()[index] = i;
    }
  }
  static __device__ void total(const Cut& cut, int count) {
    cut.out_pieces() = count;
  }
};

// Numbers the pieces from the longest to the shortest, and by head within one length, so that neighbouring warps take
// about the same time and no long piece starts last. Called by one block.
__device__ inline void arrange_pieces(const Cut& cut) {
  const int count = cut.out_pieces(), most = cut.pieces.most_members;
  int *from = cut.heads(), *to = cut.slot();
  // A radix sort by single bits, with an even number of passes, so that the result is in the first array.
  for (int bit = 0; most >> bit != 0 || bit % 2 != 0; ++bit) {
    const auto is_zero = [&](int k) { return ~((most - cut.members()[from[k]]) >> bit) & 1; };
    int own = 0, zeros = 0;
    for_each_index(count, [&](int k) { own += is_zero(k); });
    exclusive_sum(own, zeros);
    number(
        0, count, 0, is_zero, [&](int k, int zero, int before) { to[zero ? before : zeros + k - before] = from[k]; });
    int* const sorted = to;
    to = from;
    from = sorted;
  }
  number(
      0,
      count,
      0,
      [&](int k) { return cut.members()[cut.heads()[k]]; },
      [&](int k, int, int before) {
        const int head = cut.heads()[k];
        cut.out_first()[k] = before;
        cut.out_top()[k] = cut.critical()[cut.parent()[head]];
        cut.out_bottom()[k] = -1;
        cut.out_bottom_place()[k] = -1;
        cut.slot()[k] = before;
        cut.piece()[head] = k;
      });
  if (threadIdx.x == 0) {
    cut.out_first()[count] = cut.vertices() - 1;
    cut.out_critical_parent()[0] = -1;
  }
  __syncthreads();
}

// Collects the members of the pieces as positions, in any order.
struct CollectMembers {
  static __device__ void run(const Cut& cut, int i) {
    if (i > 0) {
      cut.out_vertex()[atomicAdd(cut.slot() + cut.piece()[cut.head()[i]], 1)] = i;
    }
  }
};

// Sorts the members of a piece by position, so that parents precede children. Called by one warp.
__device__ inline void order_members(const Cut& cut, int piece) {
  const int begin = cut.out_first()[piece], members = cut.out_first()[piece + 1] - begin;
  int own[kMembersOfLane], rank[kMembersOfLane] = {};
#pragma unroll
  for (int j = 0; j < kMembersOfLane; ++j) {
    const int k = j * kWarpSize + lane_index();
    own[j] = k < members ? cut.out_vertex()[begin + k] : std::numeric_limits<int>::max();
  }
#pragma unroll
  for (int j = 0; j < kMembersOfLane; ++j) {
    for (int k = 0; k < min(kWarpSize, members - j * kWarpSize); ++k) {
      const int other = __shfl_sync(kAllLanes, own[j], k);
#pragma unroll
      for (int r = 0; r < kMembersOfLane; ++r) {
        rank[r] += other < own[r];
      }
    }
  }
  const auto for_each_own = [&](const auto& visit) {
#pragma unroll
    for (int j = 0; j < kMembersOfLane; ++j) {
      if (j * kWarpSize + lane_index() < members) {
        visit(own[j], rank[j]);
      }
    }
  };
  for_each_own([&](int i, int place) { cut.place()[i] = place; });
  __syncwarp();
  for_each_own([&](int i, int place) {
    cut.out_vertex()[begin + place] = cut.vertex_at(i);
    cut.out_link()[begin + place] = cut.head()[i] == i ? -1 : cut.place()[cut.parent()[i]];
    const int critical = cut.critical()[i];
    if (critical >= 0) {
      cut.out_bottom()[piece] = critical;
      cut.out_bottom_place()[piece] = place;
      cut.out_critical_parent()[critical] = cut.out_top()[piece];
    }
  });
}

// Cuts a tree, by one block. Cut::kArrays integers per vertex of its shared memory are the arrays of the steps.
__device__ inline void cut_in_block(Cut cut) {
  const int vertices = cut.vertices();
  step_in_block<FindPositions>(cut, vertices);
  step_in_block<FindParents>(cut, vertices);
  bool any = vertices > 1;
  while (__syncthreads_or(any)) {
    any = false;
    for_each_index(vertices, [&](int i) {
      CountSubtrees::run(cut, i);
      any |= cut.next_ancestor()[i] >= 0;
    });
    ++cut.round;
  }
  step_in_block<CompareChildren>(cut, vertices);
  number_in_block<NumberCriticals>(cut, vertices);
  step_in_block<StartHeads>(cut, vertices);
  for (int step = 1; step < kHeadSteps; ++step) {
    step_in_block<FindHeads>(cut, vertices);
  }
  step_in_block<CountMembers>(cut, vertices);
  number_in_block<ListHeads>(cut, vertices);
  arrange_pieces(cut);
  step_in_block<CollectMembers>(cut, vertices);
  for (int piece = warp_index(); piece < cut.out_pieces(); piece += warps_in_block()) {
    order_members(cut, piece);
  }
}

}  // namespace grootvl::cuda
