// Trees cut into pieces that can be scanned in parallel.
//
// A vertex is critical if it is the root, or if it has children and ceil(n(v) / size) > ceil(n(c) / size) for all of
// its children c, where n is the number of vertices of a subtree (Gazit, Miller and Teng, 1988). All vertices but the
// root are partitioned into pieces. A piece is connected, has at most size + 1 vertices, is attached to one critical
// vertex (the top) and contains at most one critical vertex (the bottom), which has no child in the piece. There are at
// most 2 * ceil(L / size) critical vertices. Each of them except the root is the bottom of one piece; they form a tree
// in which the parent of a bottom is the top of its piece.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/launch.cuh"
#include "scan.h"

namespace grootvl::cuda {

// The pieces of one tree, the longest first. Critical vertices are numbered from the root (0) down.
struct TreePieces {
  int pieces, criticals;
  // For each member, piece by piece, parents before children: its vertex, and the position of its parent in the piece,
  // -1 if the parent is the top.
  const int *vertex, *link;
  // For each piece: its first member (the last one precedes that of the next piece), top and bottom as indices of
  // critical vertices, and the position of the bottom in the piece; -1 without a bottom.
  const int *first, *top, *bottom, *bottom_place;
  // For each critical vertex: its vertex, and its parent in the tree of critical vertices, -1 for the root.
  const int *critical_vertex, *critical_parent;
};

// The pieces of a batch of trees.
struct Pieces {
  int vertices;
  // Upper bounds on the members of a piece and the critical vertices of a tree.
  int most_members, most_criticals;
  // For each image, `entries` integers: kVertexArrays of L, kCriticalArrays of most_criticals, and the two counts.
  int* memory;

  static constexpr int kVertexArrays = 6, kCriticalArrays = 2;

  // A simple bound, so that fake kernels can compute the size of a cut; most_criticals is at most an eighth of the
  // vertices plus 2.
  static constexpr __host__ __device__ int64_t entries(int64_t vertices) {
    return (kVertexArrays + 1) * vertices + 8;
  }

  // The size of the definition above.
  __device__ int size_limit() const {
    return most_members - 1;
  }
  // Most images have about three pieces per two critical vertices; there may be more.
  int64_t usual_pieces() const {
    return 3 * divide_up<int64_t>(most_criticals, 2) + 1;
  }
  // Clears a vertex's share of the entries. Pieces and critical vertices do not use all of them; clearing the others
  // gives equal trees equal cuts.
  __device__ void clear(int64_t image, int vertex) const {
    int* const of_image = vertex_array(image, 0);
    for (int64_t entry = vertex; entry < entries(vertices); entry += vertices) {
      of_image[entry] = -1;
    }
  }
  __device__ int* vertex_array(int64_t image, int array) const {
    return memory + image * entries(vertices) + int64_t{array} * vertices;
  }
  __device__ int* critical_array(int64_t image, int array) const {
    return vertex_array(image, kVertexArrays) + int64_t{array} * most_criticals;
  }
  __device__ int* counts(int64_t image) const {
    return critical_array(image, kCriticalArrays);
  }
  __device__ TreePieces operator[](int64_t image) const {
    return {
        counts(image)[0],
        counts(image)[1],
        vertex_array(image, 0),
        vertex_array(image, 1),
        vertex_array(image, 2),
        vertex_array(image, 3),
        vertex_array(image, 4),
        vertex_array(image, 5),
        critical_array(image, 0),
        critical_array(image, 1)};
  }
};

// Pieces and the tensor that holds them.
struct PieceTensors {
  // (B, Pieces::entries(L)) int32, contiguous.
  at::Tensor memory;
  Pieces pieces;
};

// Memory for the pieces of a batch of trees with at least one vertex.
PieceTensors allocate_pieces(int64_t batch, int64_t vertices, const at::TensorOptions& options);

// The pieces of all trees of a batch; parent, order (B, L) int32, L >= 1. `cut`, the memory of an earlier result for
// the same trees, saves cutting them again. Invalid trees give the pieces of some other tree, but no access out of
// bounds.
PieceTensors cut_trees(const at::Tensor& parent, const at::Tensor& order, const OptionalTensor& cut);

}  // namespace grootvl::cuda
