// Boruvka's algorithm: every component adds its least edge to another component to the tree, until one component is
// left. All keys differ, so the tree is unique, and chosen edges cannot form a cycle: keys decrease along the choices,
// so that only two components can choose each other.
//
// First, a block runs the algorithm on a tile of the grid. A component whose least edge leaves the tile waits; the
// edges chosen so far are edges of the whole grid's tree. When all components wait, each has a vertex at the border of
// the tile. Rounds over all tiles and images complete the trees.
#pragma once

#include "cuda/atomics.cuh"
#include "cuda/collectives.cuh"
#include "cuda/grid.cuh"
#include "cuda/launch.cuh"

namespace grootvl::cuda {

__device__ inline void offer(Key* least, Key key) {
  // Reading first avoids most atomics when few components are left. A stale value only costs one more atomic.
  if (key < load_relaxed(least)) {
    atomicMin(least, key);
  }
}

// A rectangle of the grid, with local vertex numbers row by row.
struct Tile {
  Grid grid;
  int row, column, height, width;

  __device__ int vertices() const {
    return height * width;
  }
  __device__ int vertex(int own) const {
    return (row + own / width) * grid.width + column + own % width;
  }
  template <typename Visit>
  __device__ void for_each_edge(int own, const Visit& visit) const {
    grid.for_each_edge(vertex(own), row + own / width, column + own % width, visit);
  }
  // The local number of a vertex of the grid, -1 outside the tile.
  __device__ int own(int vertex) const {
    const int r = vertex / grid.width - row, c = vertex % grid.width - column;
    return 0 <= r && r < height && 0 <= c && c < width ? r * width + c : -1;
  }
};

// The shared memory of a block for its tile: five arrays with an entry per vertex.
struct TileMemory {
  static constexpr int64_t kBytesOfVertex = sizeof(Key) + 4 * sizeof(int);

  __device__ TileMemory(unsigned char* memory, int vertices)
      : least(reinterpret_cast<Key*>(memory)),
        component(reinterpret_cast<int*>(least + vertices)),
        leader(component + vertices),
        next(leader + vertices),
        links(next + vertices) {}

  Key* least;
  int *component, *leader, *next, *links;
};

// Finds the least edge of every component to another one, inside the tile or not.
__device__ inline void choose_edges(const float* __restrict__ weight, const Tile& tile, const TileMemory& memory) {
  for_each_index(tile.vertices(), [&](int i) { memory.least[i] = kNoEdge; });
  __syncthreads();
  for_each_index(tile.vertices(), [&](int i) {
    const int own_row = i / tile.width, own_column = i % tile.width;
    const int own = memory.component[i];
    tile.for_each_edge(i, [&](Direction direction, int edge) {
      const bool leaves = direction == kUp     ? own_row == 0
                          : direction == kDown ? own_row + 1 == tile.height
                          : direction == kLeft ? own_column == 0
                                               : own_column + 1 == tile.width;
      if (leaves) {
        offer(memory.least + own, to_key(weight[edge], edge));
      } else if (direction == kDown || direction == kRight) {
        const int other = memory.component[i + (direction == kDown ? tile.width : 1)];
        if (own != other) {
          const Key key = to_key(weight[edge], edge);
          offer(memory.least + own, key);
          offer(memory.least + other, key);
        }
      }
    });
  });
  __syncthreads();
}

// The same for the first round, in which every vertex is a component and needs no atomics.
__device__ inline void choose_first_edges(
    const float* __restrict__ weight, const Tile& tile, const TileMemory& memory) {
  for_each_index(tile.vertices(), [&](int i) {
    Key least = kNoEdge;
    tile.for_each_edge(i, [&](Direction, int edge) {
      const Key key = to_key(weight[edge], edge);
      least = key < least ? key : least;
    });
    memory.least[i] = least;
  });
  __syncthreads();
}

// Adds the least edge of a component, from low to high, to the tree, and points the component to the one that it joins.
// If two components chose the same edge, one becomes the leader, and only that one adds the edge.
__device__ inline void take_edge(
    const Grid& grid,
    const Key* least,
    const int* of_vertices,
    int* leader,
    int* links,
    int component,
    int low,
    int high) {
  const Key key = least[component];
  const int other = of_vertices[low] == component ? of_vertices[high] : of_vertices[low];
  const bool mutual = least[other] == key, leads = mutual && component < other;
  if (!leads) {
    leader[component] = other;
  }
  if (!mutual || leads) {
    const bool vertical = grid.is_vertical(edge_of(key));
    atomicOr(links + low, 1 << (vertical ? kDown : kRight));
    atomicOr(links + high, 1 << (vertical ? kUp : kLeft));
  }
}

// Joins components along the chosen edges that stay inside the tile. Returns whether there are any, to all threads.
__device__ inline bool join(const Tile& tile, const TileMemory& memory) {
  bool any = false;
  for_each_index(tile.vertices(), [&](int i) {
    const int own = memory.component[i];
    const Key key = memory.least[i];
    memory.leader[i] = own;
    if (own == i && key != kNoEdge) {
      const int low = tile.own(tile.grid.lower_end(edge_of(key)));
      const int high = tile.own(tile.grid.higher_end(edge_of(key)));
      if (low >= 0 && high >= 0) {
        take_edge(tile.grid, memory.least, memory.component, memory.leader, memory.links, i, low, high);
        any = true;
      }
    }
  });
  return __syncthreads_or(any);
}

// Follows the chains of leaders to their ends, the new components.
__device__ inline void merge(int vertices, TileMemory& memory) {
  bool moved = true;
  while (__syncthreads_or(moved)) {
    moved = false;
    for_each_index(vertices, [&](int i) {
      const int leader = memory.leader[i], further = memory.leader[leader];
      memory.next[i] = further;
      moved |= further != leader;
    });
    int* const leader = memory.leader;
    memory.leader = memory.next;
    memory.next = leader;
  }
  int* const component = memory.component;
  memory.component = memory.leader;
  memory.leader = component;
}

// Computes the components and links of a tile, by one block. Ends with a barrier.
__device__ inline void grow_components(const float* __restrict__ weight, const Tile& tile, TileMemory& memory) {
  for_each_index(tile.vertices(), [&](int i) {
    memory.component[i] = i;
    memory.links[i] = 0;
  });
  choose_first_edges(weight, tile, memory);
  while (join(tile, memory)) {
    merge(tile.vertices(), memory);
    choose_edges(weight, tile, memory);
  }
}

// ---- over many blocks ----

// The arrays of the rounds over all tiles, with an entry per vertex; `active` has one per round.
struct Components {
  Grid grid;
  const float* weight;
  // The least edges of this round, and those of the next, reset for its offers.
  Key *least, *next_least;
  // component: for each vertex, a component it was in at some time. leader: for each component, the one it joined, or
  // itself.
  int *component, *leader;
  int* links;
};

// The component at the end of a chain of leaders. Compresses the path; this is safe with concurrent readers, since
// every entry still leads to the end.
__device__ inline int find(int* leader, int component) {
  for (;;) {
    const int above = load_relaxed(leader + component);
    const int further = load_relaxed(leader + above);
    if (further == above) {
      return above;
    }
    store_relaxed(leader + component, further);
    component = further;
  }
}

// Offers the edges of a vertex to other components to both sides. Returns whether there are any.
__device__ inline bool offer_edges(const Components& all, int vertex) {
  const int own = find(all.leader, load_relaxed(all.component + vertex));
  store_relaxed(all.component + vertex, own);
  bool any = false;
  const int row = vertex / all.grid.width;
  all.grid.for_each_edge(vertex, row, vertex - row * all.grid.width, [&](Direction direction, int edge) {
    if (direction == kDown || direction == kRight) {
      const int other = find(all.leader, load_relaxed(all.component + vertex + all.grid.step(direction)));
      if (own != other) {
        const Key key = to_key(all.weight[edge], edge);
        offer(all.least + own, key);
        offer(all.least + other, key);
        any = true;
      }
    }
  });
  return any;
}

// If the vertex represents a component, joins that to the one at the other end of its least edge.
__device__ inline void join(const Components& all, int vertex) {
  const Key key = all.least[vertex];
  all.next_least[vertex] = kNoEdge;
  if (all.component[vertex] == vertex && key != kNoEdge) {
    const int low = all.grid.lower_end(edge_of(key)), high = all.grid.higher_end(edge_of(key));
    take_edge(all.grid, all.least, all.component, all.leader, all.links, vertex, low, high);
  }
}

}  // namespace grootvl::cuda
