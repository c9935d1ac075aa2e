// CPU kernel of the spanning trees of any graph: Kruskal's algorithm, parallel over the trees of a batch. Results do
// not depend on the number of threads.
#include "graph.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/ordered_bits.h"

namespace grootvl::cpu {

namespace {

struct Edge {
  int32_t first, second;
};

// Disjoint sets: which vertices the edges so far connect.
class Components {
 public:
  explicit Components(int64_t vertices) : leader_(vertices) {
    separate();
  }

  void separate() {
    std::iota(leader_.begin(), leader_.end(), 0);
  }

  int32_t find(int32_t v) {
    while (leader_[v] != v) {
      v = leader_[v] = leader_[leader_[v]];
    }
    return v;
  }

  // Merges the components of u and v. Returns whether they were different.
  bool join(int32_t u, int32_t v) {
    u = find(u);
    v = find(v);
    leader_[std::max(u, v)] = std::min(u, v);
    return u != v;
  }

 private:
  std::vector<int32_t> leader_;
};

// Memory to build trees in, one after another.
template <typename weight_t>
class GraphWorkspace {
 public:
  GraphWorkspace(const std::vector<Edge>& edges, int64_t vertices)
      : edges_(edges),
        vertices_(vertices),
        components_(vertices),
        degree_(vertices),
        across_(vertices),
        sorted_(edges.size()),
        scattered_(edges.size()),
        ascending_(edges.size()) {}

  // Builds the spanning tree. Returns false if the graph is not connected.
  bool spanning_tree(const weight_t* weight) {
    sort_edges(weight);
    components_.separate();
    std::fill(degree_.begin(), degree_.end(), 0);
    std::fill(across_.begin(), across_.end(), 0);
    int64_t missing = vertices_ - 1;
    for (auto next = ascending_.begin(); missing > 0 && next != ascending_.end(); ++next) {
      const auto [u, v] = *next;
      if (components_.join(u, v)) {
        ++degree_[u];
        ++degree_[v];
        across_[u] ^= v;
        across_[v] ^= u;
        --missing;
      }
    }
    return missing == 0;
  }

  // Roots the tree by removing its leaves one by one: the last neighbour of a leaf is its parent. A parent that becomes
  // a leaf is removed next, so that most vertices are next to their parents in the order. Consumes the tree.
  void root_at(int32_t root, int32_t* parent, int32_t* order) {
    int32_t* last = order + vertices_;
    for (int32_t v = 0; v < vertices_; ++v) {
      for (int32_t leaf = v; degree_[leaf] == 1 && leaf != root;) {
        const int32_t above = across_[leaf];
        *--last = leaf;
        parent[leaf] = above;
        degree_[leaf] = 0;
        --degree_[above];
        across_[above] ^= leaf;
        leaf = above;
      }
    }
    *order = parent[root] = root;
  }

 private:
  using key_t = OrderedBits<weight_t>;

  struct Entry {
    key_t key;
    int32_t edge;
  };

  // Sorts by weight, then by index: radix sort is stable.
  void sort_edges(const weight_t* weight) {
    constexpr int kBits = 8, kDigits = 8 * sizeof(key_t) / kBits;
    constexpr key_t kMask = (1 << kBits) - 1;
    std::array<std::array<int32_t, kMask + 1>, kDigits> position{};
    const int32_t count = static_cast<int32_t>(edges_.size());
    for (int32_t edge = 0; edge < count; ++edge) {
      const key_t key = ordered_bits(weight[edge]);
      sorted_[edge] = {key, edge};
      for (int digit = 0; digit < kDigits; ++digit) {
        ++position[digit][key >> digit * kBits & kMask];
      }
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      auto& of_digit = position[digit];
      if (std::find(of_digit.begin(), of_digit.end(), count) != of_digit.end()) {
        continue;  // all weights have the same digit
      }
      std::exclusive_scan(of_digit.begin(), of_digit.end(), of_digit.begin(), 0);
      for (const Entry& entry : sorted_) {
        scattered_[of_digit[entry.key >> digit * kBits & kMask]++] = entry;
      }
      std::swap(sorted_, scattered_);
    }
    // Gathered in advance: while joining components, each random access would stall.
    std::transform(
        sorted_.begin(), sorted_.end(), ascending_.begin(), [&](const Entry& entry) { return edges_[entry.edge]; });
  }

  const std::vector<Edge>& edges_;
  int64_t vertices_;
  Components components_;
  // Of the tree: the degree of each vertex, and the exclusive or of its neighbours.
  std::vector<int32_t> degree_, across_;
  std::vector<Entry> sorted_, scattered_;
  std::vector<Edge> ascending_;
};

std::vector<Edge> read_edges(const at::Tensor& edge_index, int64_t vertices) {
  const at::Tensor rows = edge_index.contiguous();
  const int64_t count = rows.size(1);
  const int64_t* ends = rows.const_data_ptr<int64_t>();
  std::vector<Edge> edges(count);
  for (int64_t i = 0; i < count; ++i) {
    for (const int64_t v : {ends[i], ends[count + i]}) {
      TORCH_CHECK_VALUE(
          0 <= v && v < vertices,
          "edge_index must name vertices of 0..",
          vertices - 1,
          ", got ",
          v,
          " as an end of edge ",
          i);
    }
    edges[i] = {static_cast<int32_t>(ends[i]), static_cast<int32_t>(ends[count + i])};
  }
  return edges;
}

std::vector<int32_t> read_roots(const at::Tensor& root, int64_t vertices) {
  const at::Tensor values = root.contiguous();
  std::vector<int32_t> roots;
  for (int64_t tree = 0; tree < values.size(0); ++tree) {
    const int64_t v = values.const_data_ptr<int64_t>()[tree];
    TORCH_CHECK_VALUE(
        0 <= v && v < vertices, "root must name vertices of 0..", vertices - 1, ", got ", v, " for tree ", tree);
    roots.push_back(static_cast<int32_t>(v));
  }
  return roots;
}

[[noreturn]] void refuse_disconnected(const std::vector<Edge>& edges, int64_t vertices) {
  Components components(vertices);
  int64_t count = vertices;
  for (const auto& [u, v] : edges) {
    count -= components.join(u, v);
  }
  int32_t other = 1;
  while (components.find(other) == components.find(0)) {
    ++other;
  }
  TORCH_CHECK_VALUE(
      false,
      "the graph must be connected, got ",
      count,
      " components of ",
      vertices,
      " vertices; no path leads from vertex 0 to vertex ",
      other);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> graph_tree(
    const at::Tensor& edge_index, const at::Tensor& edge_weight, int64_t num_vertices, const at::Tensor& root) {
  check_graph(edge_index, edge_weight, num_vertices, root);
  const std::vector<Edge> edges = read_edges(edge_index, num_vertices);
  const std::vector<int32_t> roots = read_roots(root, num_vertices);
  // float32 represents 16-bit weights exactly.
  const bool is_double = edge_weight.scalar_type() == at::kDouble;
  const at::Tensor weight = edge_weight.to(is_double ? at::kDouble : at::kFloat).contiguous();
  const int64_t batch = weight.size(0), num_edges = weight.size(1);
  at::Tensor parent = at::empty({batch, num_vertices}, weight.options().dtype(at::kInt));
  at::Tensor order = at::empty({batch, num_vertices}, weight.options().dtype(at::kInt));
  int32_t* parents = parent.mutable_data_ptr<int32_t>();
  int32_t* orders = order.mutable_data_ptr<int32_t>();
  std::atomic<int64_t> bad{-1};
  std::atomic<bool> is_connected{true};
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "graph_tree", [&] {
    const scalar_t* weights = weight.const_data_ptr<scalar_t>();
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      GraphWorkspace<scalar_t> workspace(edges, num_vertices);
      for (int64_t tree = begin; tree < end && is_connected && bad < 0; ++tree) {
        const scalar_t* of_tree = weights + tree * num_edges;
        if (std::any_of(of_tree, of_tree + num_edges, [](scalar_t w) { return w != w; })) {
          bad = tree;
        } else if (!workspace.spanning_tree(of_tree)) {
          is_connected = false;
        } else {
          workspace.root_at(roots[tree], parents + tree * num_vertices, orders + tree * num_vertices);
        }
      }
    });
  });
  TORCH_CHECK_VALUE(bad < 0, "edge_weight must not be NaN, got NaN values for tree ", bad.load(), " of the batch");
  if (!is_connected) {
    refuse_disconnected(edges, num_vertices);
  }
  return {parent, order};
}

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("graph_tree", &graph_tree);
}

}  // namespace grootvl::cpu
