// The parents of a spanning tree of the grid, and an order of its vertices, by the Euler tour technique.
//
// Every edge is two arcs, there and back. An arc is followed by that of the next direction, in cyclic order, in which
// the vertex at its end has an edge: this makes one tour of all arcs, which starts and ends at the root. List ranking
// by pointer jumping computes how many arcs of the tour are left at each arc. An arc leads away from the root if it
// precedes its reverse, and these arcs reach the vertices in depth-first order: parents before children, subtrees
// contiguous.
#pragma once

#include "cuda/atomics.cuh"
#include "cuda/grid.cuh"
#include "cuda/steps.cuh"

namespace grootvl::cuda {

// A tour of the tree of one image. Arc 4 * v + d leaves vertex v in direction d. The lower half of a word is the arc at
// some distance along the tour, all ones after the last arc; the upper half is that distance. Vertices of the tour have
// type Place, all ones for arcs towards the root.
template <typename Word, typename Place>
struct Tour {
  static constexpr int kHalf = 4 * sizeof(Word);
  static constexpr Word kEnd = (Word{1} << kHalf) - 1;
  static constexpr Place kBack = static_cast<Place>(~Place{0});
  // The most vertices whose arcs fit into half a word.
  static constexpr int64_t kMostVertices = static_cast<int64_t>(kEnd >> 2);

  Grid grid;
  int root;
  // The directions of each vertex that have an edge, as bits.
  const int* links;
  // (4 * L)
  Word* words;
  // (2 * L - 2), in the order of the tour.
  Place* vertices;
  int *parent, *order;

  __device__ int arcs() const {
    return 2 * grid.vertices() - 2;
  }
  __device__ bool exists(int arc) const {
    return links[arc / kDirections] >> arc % kDirections & 1;
  }
  __device__ int head(int arc) const {
    return arc / kDirections + grid.step(arc % kDirections);
  }
  __device__ int way_back(int arc) const {
    return head(arc) * kDirections + (arc % kDirections ^ 1);
  }
  // The arc after this one.
  __device__ Word next(int arc) const {
    const int vertex = head(arc), open = links[vertex];
    const int back = arc % kDirections ^ 1;
    // The directions in cyclic order after the way back, which comes last.
    const int turned = (open << kDirections | open) >> (back + 1) & ((1 << kDirections) - 1);
    const int direction = (back + __ffs(turned)) % kDirections;
    const bool ends = vertex == root && direction == __ffs(open) - 1;
    return ends ? kEnd : static_cast<Word>(vertex * kDirections + direction);
  }
  // The number of arcs left, including this one.
  __device__ int left(int arc) const {
    return static_cast<int>(words[arc] >> kHalf);
  }

  // The initial word of an arc, `steps` steps along the tour.
  __device__ void start(int arc, int steps) const {
    if (!exists(arc)) {
      words[arc] = kEnd;
      return;
    }
    Word after = next(arc);
    int distance = 1;
    for (; after != kEnd && distance < steps; ++distance) {
      after = next(static_cast<int>(after));
    }
    words[arc] = static_cast<Word>(distance) << kHalf | after;
  }

  // Pointer jumping. Other threads may jump concurrently, since every word is valid at any time. Returns whether the
  // end has not been reached.
  __device__ bool jump(int arc, int jumps) const {
    const Word before = load_relaxed(words + arc);
    Word word = before;
    for (int i = 0; i < jumps && (word & kEnd) != kEnd; ++i) {
      const Word further = load_relaxed(words + (word & kEnd));
      word = (word & ~kEnd) + further;
    }
    if (word != before) {
      store_relaxed(words + arc, word);
    }
    return (word & kEnd) != kEnd;
  }

  // Sets the parent of a vertex, and the vertices of the tour at the arcs between them.
  __device__ void root_vertex(int vertex) const {
    if (vertex == root) {
      parent[vertex] = vertex;
      order[0] = vertex;
    }
    for (int direction = 0; direction < kDirections; ++direction) {
      const int up = vertex * kDirections + direction;
      if (exists(up) && left(up) < left(way_back(up))) {
        parent[vertex] = head(up);
        vertices[arcs() - left(up)] = kBack;
        vertices[arcs() - left(way_back(up))] = static_cast<Place>(vertex);
      }
    }
  }
};

// The order is the sequence of vertices of the tour. A step (steps.cuh).
struct OrderVertices {
  template <typename Tour>
  static __device__ int value(const Tour& tour, int i) {
    return tour.vertices[i] != Tour::kBack;
  }
  template <typename Tour>
  static __device__ void place(const Tour& tour, int i, int is_vertex, int before) {
    if (is_vertex) {
      tour.order[1 + before] = static_cast<int>(tour.vertices[i]);
    }
  }
  template <typename Tour>
  static __device__ void total(const Tour&, int) {}
};

}  // namespace grootvl::cuda
