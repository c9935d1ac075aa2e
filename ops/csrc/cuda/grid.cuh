// The 4-connected grid in kernels: vertices, edges, and the order of the edges.
#pragma once

#include "cuda/launch.cuh"

namespace grootvl::cuda {

// Directions from a vertex, in the order of the indices of its edges; bits of a vertex's links. Opposite directions
// differ in the lowest bit.
enum Direction : int { kUp, kDown, kLeft, kRight, kDirections };

struct Grid {
  int height, width;

  __host__ __device__ int vertices() const {
    return height * width;
  }
  __host__ __device__ int64_t edges() const {
    return int64_t{2} * vertices() - height - width;
  }
  __device__ int num_vertical() const {
    return (height - 1) * width;
  }
  __device__ bool is_vertical(int edge) const {
    return edge < num_vertical();
  }
  __device__ int lower_end(int edge) const {
    const int horizontal = edge - num_vertical();
    return horizontal < 0 ? edge : horizontal + horizontal / (width - 1);
  }
  __device__ int higher_end(int edge) const {
    return lower_end(edge) + (is_vertical(edge) ? width : 1);
  }
  __device__ int step(int direction) const {
    return direction == kUp ? -width : direction == kDown ? width : direction == kLeft ? -1 : 1;
  }
  // Calls visit(direction, edge) for the edges of a vertex.
  template <typename Visit>
  __device__ void for_each_edge(int vertex, int row, int column, const Visit& visit) const {
    // The horizontal edge to the right; that to the left precedes it.
    const int horizontal = num_vertical() + vertex - row;
    if (row > 0) {
      visit(kUp, vertex - width);
    }
    if (row + 1 < height) {
      visit(kDown, vertex);
    }
    if (column > 0) {
      visit(kLeft, horizontal - 1);
    }
    if (column + 1 < width) {
      visit(kRight, horizontal);
    }
  }
};

// Orders edges by weight, then by index.
using Key = unsigned long long;
constexpr Key kNoEdge = ~Key{0};

__device__ inline Key to_key(float weight, int edge) {
  // Adding zero turns -0 into 0.
  const unsigned bits = __float_as_uint(weight + 0.0f);
  const unsigned ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ascending) << 32 | static_cast<unsigned>(edge);
}

__device__ inline int edge_of(Key key) {
  return static_cast<int>(key & 0xffffffff);
}

}  // namespace grootvl::cuda
