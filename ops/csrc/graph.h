// Spanning trees of any connected graph: the contract, and its checks.
//
// graph_tree(edge_index, edge_weight, num_vertices, root) -> (parent, order)
//   edge_index (2, E) int64: both ends of each edge, shared by the batch. edge_weight (B, E), any floating dtype, may
//   be infinite but not NaN. root (B,) int64. parent (B, L) int32, L = num_vertices: the parents in the minimum
//   spanning trees; the root is its own parent. order (B, L) int32: all vertices, each parent before its children. Ties
//   go to the lower edge index. Self-loops are never in a tree.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

namespace grootvl {

inline void check_graph(
    const at::Tensor& edge_index, const at::Tensor& edge_weight, int64_t num_vertices, const at::Tensor& root) {
  TORCH_CHECK_TYPE(
      edge_index.scalar_type() == at::kLong && root.scalar_type() == at::kLong,
      "edge_index and root must be int64, got ",
      edge_index.scalar_type(),
      " and ",
      root.scalar_type());
  TORCH_CHECK_TYPE(
      edge_weight.is_floating_point(), "edge_weight must be a floating dtype, got ", edge_weight.scalar_type());
  TORCH_CHECK_VALUE(
      edge_index.dim() == 2 && edge_index.size(0) == 2, "edge_index must have shape (2, E), got ", edge_index.sizes());
  const int64_t num_edges = edge_index.size(1);
  TORCH_CHECK_VALUE(
      edge_weight.dim() == 2 && edge_weight.size(1) == num_edges,
      "edge_weight must have shape (B, ",
      num_edges,
      "), got ",
      edge_weight.sizes());
  TORCH_CHECK_VALUE(
      root.dim() == 1 && root.size(0) == edge_weight.size(0),
      "root must have shape (",
      edge_weight.size(0),
      "), got ",
      root.sizes());
  // Kernels index vertices and edges by int32.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      0 < num_vertices && num_vertices < kLargest && num_edges < kLargest,
      "there must be 1 to 2^31 - 2 vertices and at most 2^31 - 2 edges, got ",
      num_vertices,
      " and ",
      num_edges);
}

}  // namespace grootvl
