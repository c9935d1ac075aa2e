// Trees cut into pieces that can be scanned side by side.
//
// A vertex is critical when it is the root, or has children and more multiples of `size` below it than below each of
// them: ceil(n(v) / size) > ceil(n(c) / size) for all children c, n being the number of vertices of the subtree (Gazit,
// Miller and Teng, 1988). All vertices but the root fall into pieces: connected, of at most size + 1 vertices, hanging
// from one critical vertex (the top), with at most one critical vertex among them (the bottom), which has no child in
// the piece. There are at most 2 * ceil(L / size) critical vertices. Each but the root is the bottom of one piece, and
// they form a tree in which its parent is the top of that piece.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/launch.cuh"
#include "scan.h"

namespace grootvl::cuda {

// The pieces of one tree, the longest first. Indices of critical vertices ascend from the root (0) down.
struct TreePieces {
  int pieces, criticals;
  // Of the members of the pieces, one piece after another, every parent before its children: the vertex, and the place
  // of its parent in the piece, -1 below the top.
  const int *vertex, *link;
  // Of each piece: its first member (that of the next piece ends it), the top and the bottom as indices of critical
  // vertices, and the place of the bottom in the piece; -1 without a bottom.
  const int *first, *top, *bottom, *bottom_place;
  // Of each critical vertex: the vertex, and its parent among the critical ones, -1 for the root.
  const int *critical_vertex, *critical_parent;
};

// The pieces of a batch of trees.
struct Pieces {
  int vertices;
  // Upper bounds of the members of a piece and of the critical vertices of a tree.
  int most_members, most_criticals;
  // Of each image `entries` integers: kVertexArrays of L, kCriticalArrays of most_criticals, and the two counts.
  int* memory;

  static constexpr int kVertexArrays = 6, kCriticalArrays = 2;

  // Simple rather than tight, so that the size of a cut is known from that of its trees; most_criticals is at most an
  // eighth of the vertices and 2.
  static constexpr __host__ __device__ int64_t entries(int64_t vertices) {
    return (kVertexArrays + 1) * vertices + 8;
  }

  // Most images have about three pieces for two critical vertices; there may be more.
  int64_t usual_pieces() const {
    return 3 * divide_up<int64_t>(most_criticals, 2) + 1;
  }
  // A vertex's share of the entries. Pieces and critical vertices take as many as there are of them; with the others
  // cleared, equal trees have equal cuts.
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

// Pieces and the memory they lie in.
struct PieceTensors {
  // (B, Pieces::entries(L)) int32, contiguous.
  at::Tensor memory;
  Pieces pieces;
};

// The pieces of every tree of a batch; parent, order (B, L) int32, L >= 1. A cut is the memory of an earlier result for
// the same trees; without one they are cut. What is no tree in topological order gives pieces of some other tree, but
// no access out of bounds.
PieceTensors cut_trees(const at::Tensor& parent, const at::Tensor& order, const OptionalTensor& cut);

}  // namespace grootvl::cuda
