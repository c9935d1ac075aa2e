// The parents of a spanning tree of the grid and an order of its vertices, from nothing but the edges.
//
// Every edge is two arcs, there and back. Turning, at the end of an arc, to the next direction of the vertex that has
// an edge makes one tour of all arcs around the tree, which starts and ends at the root. How many arcs are left of the
// tour at each (list ranking, by pointer jumping) tells everything: an arc comes before its way back if it leads away
// from the root, and in the order of the tour these arcs reach the vertices, every parent before its children, and
// every subtree without a gap.
#pragma once

#include "cuda/atomics.cuh"
#include "cuda/grid.cuh"
#include "cuda/steps.cuh"

namespace grootvl::cuda {

// A tour of the tree of one image. Arc 4 * v + d leads from vertex v into direction d. A word has the arc that follows
// at some distance in its lower half, all ones behind the last one, and the distance in the upper half. Vertices of the
// tour are of type Place, all ones for arcs that lead back.
template <typename Word, typename Place>
struct Tour {
  static constexpr int kHalf = 4 * sizeof(Word);
  static constexpr Word kEnd = (Word{1} << kHalf) - 1;
  static constexpr Place kBack = static_cast<Place>(~Place{0});
  // Arcs of as many vertices can be told apart.
  static constexpr int64_t kMostVertices = static_cast<int64_t>(kEnd >> 2);

  Grid grid;
  int root;
  // Of each vertex: its directions with an edge, as bits.
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
    // The directions after the way back, which is the last of them.
    const int turned = (open << kDirections | open) >> (back + 1) & ((1 << kDirections) - 1);
    const int direction = (back + __ffs(turned)) % kDirections;
    const bool ends = vertex == root && direction == __ffs(open) - 1;
    return ends ? kEnd : static_cast<Word>(vertex * kDirections + direction);
  }
  // How many arcs are left, this one among them.
  __device__ int left(int arc) const {
    return static_cast<int>(words[arc] >> kHalf);
  }

  // The first word of an arc: as many steps along the tour.
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

  // Jumps to where the arc jumped to leads. Others may jump meanwhile: every word they write is true. Returns whether
  // the end has not been reached.
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

  // The parent of a vertex, and the places of the arcs between them in the tour.
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

// The order: the vertices of the tour. A step (steps.cuh).
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
