// Edge weights and spanning trees of one image. Included once for each instruction set, inside its namespace.

struct TreeKernels : Elementary {
  // ---- edge weights ----

  // The term that a pair of values adds to its edge: a product for the cosine, otherwise a distance.
  template <Metric metric, typename acc_t>
  static acc_t term(acc_t a, acc_t b) {
    if constexpr (metric == Metric::kCosine) {
      return a * b;
    } else if constexpr (metric == Metric::kEuclidean) {
      return (a - b) * (a - b);
    } else {
      return std::abs(a - b);
    }
  }

  // The sums of terms between a vertex and its neighbours to the right and below, and the square of its norm (cosine
  // only), computed in one pass over the features.
  template <typename acc_t>
  struct Sums {
    acc_t right, below, square;
  };

  template <Metric metric, typename scalar_t, typename acc_t>
  static Sums<acc_t> sum_terms(
      const scalar_t* __restrict own,
      const scalar_t* __restrict right,
      const scalar_t* __restrict below,
      int64_t channels) {
    acc_t to_right[kLanes] = {}, to_below[kLanes] = {}, to_self[kLanes] = {};
    const auto add = [&](const scalar_t* a, const scalar_t* b, const scalar_t* c) {
      for (int i = 0; i < kLanes; ++i) {
        const acc_t f = static_cast<acc_t>(a[i]);
        to_right[i] += term<metric>(f, static_cast<acc_t>(b[i]));
        to_below[i] += term<metric>(f, static_cast<acc_t>(c[i]));
        if constexpr (metric == Metric::kCosine) {
          to_self[i] += f * f;
        }
      }
    };
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      add(own + c, right + c, below + c);
    }
    if (c < channels) {
      // The remainder is padded with zeros, so that the sums stay in registers.
      scalar_t a[kLanes] = {}, b[kLanes] = {}, d[kLanes] = {};
      std::copy(own + c, own + channels, a);
      std::copy(right + c, right + channels, b);
      std::copy(below + c, below + channels, d);
      add(a, b, d);
    }
    return {add_lanes(to_right), add_lanes(to_below), add_lanes(to_self)};
  }

  // Turns sums into weights. `first` and `second` are the norms of both ends (cosine only).
  template <Metric metric, typename acc_t>
  static void finish(
      const acc_t* __restrict sums,
      const acc_t* __restrict first,
      const acc_t* __restrict second,
      int64_t count,
      bool log,
      float* __restrict weight) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    for (int64_t i = 0; i < count; ++i) {
      acc_t exponent = sums[i];
      if constexpr (metric == Metric::kCosine) {
        exponent = -exponent / (first[i] * second[i]);
      }
      const float x = static_cast<float>(exponent);
      const float w = log ? x : exponential(std::min(x, 89.0f));
      weight[i] = x <= kLargest && w <= kLargest ? w : kLargest;
    }
  }

  // Weights of the edges whose upper or left end is in rows begin..end-1. `scratch` has 5 * width values.
  template <Metric metric, typename scalar_t, typename acc_t>
  static void edge_weight_rows(
      const scalar_t* feature,
      int64_t channels,
      int64_t height,
      int64_t width,
      int64_t begin,
      int64_t end,
      bool log,
      float* weight,
      acc_t* scratch) {
    acc_t* horizontal = scratch;
    acc_t* vertical = scratch + width;
    acc_t* norm = scratch + 2 * width;
    acc_t* vertical_above = scratch + 3 * width;
    acc_t* norm_above = scratch + 4 * width;
    float* horizontal_weight = weight + (height - 1) * width;
    for (int64_t r = begin; r < end; ++r) {
      const scalar_t* row = feature + r * width * channels;
      const int64_t to_below = r + 1 < height ? width * channels : 0;
      for (int64_t c = 0; c < width; ++c) {
        const scalar_t* own = row + c * channels;
        const scalar_t* right = c + 1 < width ? own + channels : own;
        const Sums<acc_t> sums = sum_terms<metric, scalar_t, acc_t>(own, right, own + to_below, channels);
        horizontal[c] = sums.right;
        vertical[c] = sums.below;
        norm[c] = sums.square;
      }
      roots<metric>(norm, width);
      finish<metric>(horizontal, norm, norm + 1, width - 1, log, horizontal_weight + r * (width - 1));
      // The weights from the row above to this one need the norms of both.
      if (r > begin) {
        finish<metric>(vertical_above, norm_above, norm, width, log, weight + (r - 1) * width);
      }
      std::swap(vertical, vertical_above);
      std::swap(norm, norm_above);
    }
    if (end < height) {
      const scalar_t* row = feature + end * width * channels;
      for (int64_t c = 0; c < width; ++c) {
        const scalar_t* own = row + c * channels;
        norm[c] = sum_terms<metric, scalar_t, acc_t>(own, own, own, channels).square;
      }
      roots<metric>(norm, width);
      finish<metric>(vertical_above, norm_above, norm, width, log, weight + (end - 1) * width);
    }
  }

  // Turns squared norms into norms, in place.
  template <Metric metric, typename acc_t>
  static void roots(acc_t* norm, int64_t count) {
    if constexpr (metric == Metric::kCosine) {
      for (int64_t i = 0; i < count; ++i) {
        norm[i] = std::max(std::sqrt(norm[i]), static_cast<acc_t>(1e-8));
      }
    }
  }

  // ---- spanning tree ----

  // Directions from a vertex, in the order of the indices of its edges; bits of a vertex's links.
  enum : uint8_t { kUp = 0, kDown = 1, kLeft = 2, kRight = 3 };

  // Converts weights to ordered integers below kNoEdge.
  static void to_ordered_bits(const float* __restrict weight, int64_t count, uint32_t* __restrict key) {
    for (int64_t i = 0; i < count; ++i) {
      key[i] = ordered_bits(weight[i]);
    }
  }

  // The first round of Boruvka's algorithm: every vertex chooses its edge of least weight. Padding holds kNoEdge.
  static void choose_neighbours(TreeWorkspace& w) {
    const int32_t width = static_cast<int32_t>(w.width), vertices = static_cast<int32_t>(w.height * w.width);
    const uint32_t* __restrict up = w.vertical.data();
    const uint32_t* __restrict down = up + width;
    const uint32_t* __restrict left = w.horizontal.data();
    const uint32_t* __restrict right = left + 1;
    int32_t* __restrict leader = w.leader.data();
    uint8_t* __restrict chosen = w.chosen.data() + width;
#pragma GCC ivdep
    for (int32_t v = 0; v < vertices; ++v) {
      uint32_t least = up[v];
      int32_t direction = kUp;
      int32_t offset = -width;
      direction = down[v] < least ? kDown : direction;
      offset = down[v] < least ? width : offset;
      least = std::min(least, down[v]);
      direction = left[v] < least ? kLeft : direction;
      offset = left[v] < least ? -1 : offset;
      least = std::min(least, left[v]);
      direction = right[v] < least ? kRight : direction;
      offset = right[v] < least ? 1 : offset;
      leader[v] = v + offset;
      chosen[v] = static_cast<uint8_t>(1 << direction);
    }
  }

  // Pointer doubling: to[c] = from[from[c]].
  static void double_pointers(int32_t count, const int32_t* __restrict from, int32_t* __restrict to) {
#pragma GCC ivdep
    for (int32_t c = 0; c < count; ++c) {
      to[c] = from[from[c]];
    }
  }

  // joined[c] = the id of the root that c points to. Returns false if any c does not point to a root yet.
  static bool rename(
      int32_t count, const int32_t* __restrict pointer, const int32_t* __restrict id, int32_t* __restrict joined) {
    int32_t all = 0;
#pragma GCC ivdep
    for (int32_t c = 0; c < count; ++c) {
      joined[c] = id[pointer[c]];
      all |= joined[c];
    }
    return all >= 0;
  }

  // Joins each component c to leader[c], the component at the other end of its chosen edge; both may have chosen the
  // same edge. joined[c] becomes the new component of c. Returns the number of components. Overwrites leader.
  static int32_t join(TreeWorkspace& w, int32_t count, int32_t* __restrict joined) {
    int32_t* __restrict leader = w.leader.data();
    int32_t* __restrict next = w.next.data();
    int32_t* __restrict id = w.id.data();
#pragma GCC ivdep
    for (int32_t c = 0; c < count; ++c) {
      const int32_t other = leader[c];
      next[c] = leader[other] == c && c < other ? c : other;
    }
    const int32_t components = Compact::number_roots(count, next, id);
    // Alternates between two arrays. Three doublings reach 8 steps, which is nearly always enough.
    double_pointers(count, next, leader);
    double_pointers(count, leader, next);
    double_pointers(count, next, leader);
    while (!rename(count, leader, id, joined)) {
      double_pointers(count, leader, next);
      double_pointers(count, next, leader);
    }
    return components;
  }

  static uint32_t high(uint64_t word) {
    return static_cast<uint32_t>(word >> 32);
  }

  static uint32_t low(uint64_t word) {
    return static_cast<uint32_t>(word);
  }

  // A later round, on the grid: every vertex offers its least edge to another component, and every component chooses
  // the least offer. Missing edges have weight kNoEdge.
  static void choose_on_grid(TreeWorkspace& w, int32_t components) {
    const int32_t width = static_cast<int32_t>(w.width), vertices = static_cast<int32_t>(w.height * w.width);
    const uint32_t* __restrict up = w.vertical.data();
    const uint32_t* __restrict down = up + width;
    const uint32_t* __restrict left = w.horizontal.data();
    const uint32_t* __restrict right = left + 1;
    const int32_t* __restrict label = w.labels.data() + width;
    const int32_t* __restrict above = label - width;
    const int32_t* __restrict below = label + width;
    const int32_t* __restrict before = label - 1;
    const int32_t* __restrict after = label + 1;
    uint64_t* __restrict offer = w.keys.data();  // not in use before the first list
#pragma GCC ivdep
    for (int32_t v = 0; v < vertices; ++v) {
      const int32_t own = label[v];
      const uint32_t to_up = above[v] != own ? up[v] : kNoEdge;
      const uint32_t to_down = below[v] != own ? down[v] : kNoEdge;
      const uint32_t to_left = before[v] != own ? left[v] : kNoEdge;
      const uint32_t to_right = after[v] != own ? right[v] : kNoEdge;
      uint32_t least = to_up;
      int32_t edge = v - width;
      edge = to_down < least ? v : edge;
      least = std::min(least, to_down);
      edge = to_left < least ? vertices + v - 1 : edge;
      least = std::min(least, to_left);
      edge = to_right < least ? vertices + v : edge;
      least = std::min(least, to_right);
      offer[v] = pack(least, static_cast<uint32_t>(edge));
    }
    uint64_t* __restrict least = w.least.data();
    std::fill(least, least + components, ~uint64_t{0});
    // Updates of the same component depend on each other; distant vertices rarely share a component.
    const int32_t quarter = vertices / 4;
    const auto take = [&](int32_t v) {
      const int32_t c = label[v];
      least[c] = std::min(least[c], offer[v]);
    };
    for (int32_t v = 0; v < quarter; ++v) {
      take(v);
      take(quarter + v);
      take(2 * quarter + v);
      take(3 * quarter + v);
    }
    for (int32_t v = 4 * quarter; v < vertices; ++v) {
      take(v);
    }
    for (int32_t c = 0; c < components; ++c) {
      const uint32_t edge = static_cast<uint32_t>(least[c]);
      const uint32_t v = lower_end(w, edge);
      w.leader.data()[c] = label[v] ^ label[v + (edge < static_cast<uint32_t>(vertices) ? width : 1)] ^ c;
      link(w, edge);
    }
  }

  // Edges are indexed as vertex (down) or number of vertices + vertex (right).
  static uint32_t lower_end(const TreeWorkspace& w, uint32_t edge) {
    const uint32_t vertices = static_cast<uint32_t>(w.height * w.width);
    return edge < vertices ? edge : edge - vertices;
  }

  static void link(TreeWorkspace& w, uint32_t edge) {
    const bool is_vertical = edge < static_cast<uint32_t>(w.height * w.width);
    w.chosen[w.width + lower_end(w, edge)] |= 1 << (is_vertical ? kDown : kRight);
  }

  // Renames the components of all vertices after a round on the grid.
  static void relabel(TreeWorkspace& w) {
    const int64_t vertices = w.height * w.width;
    const int32_t* __restrict component = w.joined.data();
    int32_t* __restrict label = w.labels.data() + w.width;
#pragma GCC ivdep
    for (int64_t v = 0; v < vertices; ++v) {
      label[v] = component[label[v]];
    }
  }

  // Lists the edges between different components, in the order of their indices.
  static int64_t list_edges(TreeWorkspace& w) {
    const int64_t width = w.width, vertices = w.height * w.width;
    const int32_t* __restrict component = w.labels.data() + width;
    const uint32_t* __restrict down = w.vertical.data() + width;
    const uint32_t* __restrict right = w.horizontal.data() + 1;
    uint64_t* ends = w.ends.data();
    uint64_t* keys = w.keys.data();
    const int64_t count = Compact::list_crossing(vertices - width, component, component + width, down, 0, ends, keys);
    const uint32_t first = static_cast<uint32_t>(vertices);
    return count +
           Compact::list_crossing(vertices - 1, component, component + 1, right, first, ends + count, keys + count);
  }

  // A later round, on the list of edges.
  static void choose_edges(TreeWorkspace& w, int32_t components, int64_t num_edges) {
    const uint64_t* __restrict ends = w.ends.data();
    const uint64_t* __restrict keys = w.keys.data();
    uint64_t* __restrict least = w.least.data();
    std::fill(least, least + components, ~uint64_t{0});
    // Compares positions in the list instead of edge indices: their order is the same.
    const auto offer = [&](int64_t i) {
      const uint32_t u = high(ends[i]), v = low(ends[i]);
      const uint64_t key = (keys[i] & ~uint64_t{0xffffffff}) | static_cast<uint64_t>(i);
      least[u] = std::min(least[u], key);
      least[v] = std::min(least[v], key);
    };
    // Interleaved for the same reason as in choose_on_grid.
    const int64_t quarter = num_edges / 4;
    for (int64_t i = 0; i < quarter; ++i) {
      offer(i);
      offer(quarter + i);
      offer(2 * quarter + i);
      offer(3 * quarter + i);
    }
    for (int64_t i = 4 * quarter; i < num_edges; ++i) {
      offer(i);
    }
    for (int32_t c = 0; c < components; ++c) {
      const uint32_t i = low(least[c]);
      w.leader.data()[c] = static_cast<int32_t>(high(ends[i]) ^ low(ends[i])) ^ c;
      link(w, low(keys[i]));
    }
  }

  // Renames the components at the ends of the edges and drops edges inside a component.
  static int64_t keep_crossing(TreeWorkspace& w, int64_t num_edges) {
    const int32_t* __restrict component = w.joined.data();
    uint64_t* ends = w.ends.data();
    uint64_t* keys = w.keys.data();
    int64_t kept = 0;
    for (int64_t i = 0; i < num_edges; ++i) {
      const int32_t u = component[high(ends[i])], v = component[low(ends[i])];
      keys[kept] = keys[i];
      ends[kept] = pack(u, v);
      kept += u != v;
    }
    return kept;
  }

  // `chosen` has each edge at one end or both, `links` at both. No chosen edge leaves the grid, so vertices that are
  // neighbours in memory but not in the grid are never linked.
  static void mirror_links(TreeWorkspace& w, int64_t slot) {
    const int64_t width = w.width, vertices = w.height * w.width;
    const uint8_t* __restrict own = w.chosen.data() + width;
    const uint8_t* __restrict above = own - width;
    const uint8_t* __restrict below = own + width;
    const uint8_t* __restrict before = own - 1;
    const uint8_t* __restrict after = own + 1;
    uint8_t* __restrict links = w.links.data() + slot * vertices;
    const auto moved = [](uint8_t mask, int from, int to) { return (mask >> from & 1) << to; };
#pragma GCC ivdep
    for (int64_t v = 0; v < vertices; ++v) {
      links[v] = static_cast<uint8_t>(
          own[v] | moved(above[v], kDown, kUp) | moved(below[v], kUp, kDown) | moved(before[v], kRight, kLeft) |
          moved(after[v], kLeft, kRight));
    }
  }

  // Builds the spanning tree and writes its links to a slot of the workspace.
  static void spanning_tree(const float* weight, TreeWorkspace& w, int64_t slot) {
    const int64_t height = w.height, width = w.width;
    to_ordered_bits(weight, (height - 1) * width, w.vertical.data() + width);
    for (int64_t r = 0; r < height; ++r) {
      const float* row = weight + (height - 1) * width + r * (width - 1);
      to_ordered_bits(row, width - 1, w.horizontal.data() + r * width + 1);
    }
    choose_neighbours(w);
    int32_t components = join(w, static_cast<int32_t>(height * width), w.labels.data() + width);
    if (components > 1) {
      choose_on_grid(w, components);
      components = join(w, components, w.joined.data());
    }
    if (components > 1) {
      relabel(w);
      int64_t num_edges = list_edges(w);
      while (true) {
        choose_edges(w, components, num_edges);
        components = join(w, components, w.joined.data());
        if (components == 1) {
          break;
        }
        num_edges = keep_crossing(w, num_edges);
      }
    }
    mirror_links(w, slot);
  }

  // Depth-first traversal from the root: a vertex is mostly followed by a child, so that scans find its parent in the
  // cache. The next vertex is chosen without a branch, and a first child bypasses the stack. Each step depends on the
  // one before, so the traversals of kCount images are interleaved.
  template <int kCount>
  static void walk(int64_t root, TreeWorkspace& w, int32_t* __restrict parent, int32_t* __restrict order) {
    const int64_t vertices = w.height * w.width;
    const int32_t width = static_cast<int32_t>(w.width);
    const int32_t offset[4] = {-width, width, -1, 1};
    // A stack entry is 4 * vertex + direction to the parent. For each set of children: the first of them, in the order
    // down, up, left, right, as the offset from 4 * vertex to its entry, and the later ones, which go on the stack.
    uint32_t first[16];
    uint8_t later[16];
    for (uint32_t children = 0; children < 16; ++children) {
      const int32_t direction = children >> kDown & 1   ? kDown
                                : children >> kUp & 1   ? kUp
                                : children >> kLeft & 1 ? kLeft
                                                        : kRight;
      first[children] = static_cast<uint32_t>(4 * offset[direction] + (direction ^ 1));
      later[children] = static_cast<uint8_t>(children & ~(1 << direction));
    }
    const uint8_t* __restrict links = w.links.data();
    // The entry below the stack is read when the stack is empty, but not used.
    uint32_t* __restrict stacks = w.stack.data() + 1;
    int64_t top[kCount];
    uint32_t vertex[kCount], children[kCount];
    for (int k = 0; k < kCount; ++k) {
      parent[k * vertices + root] = order[k * vertices] = static_cast<int32_t>(root);
      top[k] = k * (vertices + 4);
      vertex[k] = static_cast<uint32_t>(root);
      children[k] = links[k * vertices + root];
    }
    for (int64_t i = 1; i < vertices; ++i) {
#pragma GCC unroll 2
      for (int k = 0; k < kCount; ++k) {
        const uint32_t v = vertex[k], of_v = children[k];
        uint32_t* stack = stacks + top[k];
        const uint32_t inner = of_v != 0 ? 0xffffffff : 0;
        const uint32_t entry = ((4 * v + first[of_v]) & inner) | (stack[-1] & ~inner);
        stack -= of_v == 0;
        *stack = 4 * (v + 1) + kLeft;
        stack += later[of_v] >> kRight & 1;
        *stack = 4 * (v - 1) + kRight;
        stack += later[of_v] >> kLeft & 1;
        *stack = 4 * (v - width) + kDown;
        stack += later[of_v] >> kUp & 1;
        top[k] = stack - stacks;
        const uint32_t next = entry >> 2;
        vertex[k] = next;
        children[k] = links[k * vertices + next] & ~(1u << (entry & 3));
        parent[k * vertices + next] = static_cast<int32_t>(next) + offset[entry & 3];
        order[k * vertices + i] = static_cast<int32_t>(next);
      }
    }
  }
};
