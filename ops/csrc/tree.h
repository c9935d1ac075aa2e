// Spanning trees of the 4-connected grid: the contract on every device, and its checks.
//
// grid_edge_weight(feature, metric, log) -> weight
//   feature (B, C, H, W), any floating dtype and strides. weight (B, E) float32, E = (H-1)*W + H*(W-1): first the
//   vertical edges (v, v+W), then the horizontal edges (v, v+1), each row by row. Always finite: overflow and NaN
//   become the largest float32. With log, the exponents of the weights.
// grid_tree(edge_weight, height, width, root) -> (parent, order)
//   edge_weight (B, E) float32, finite. parent (B, L) int32, L = height * width: the parents in the minimum spanning
//   tree; the root is its own parent. order (B, L) int32: all vertices, each parent before its children. Ties go to the
//   lower edge index.
// grid_tree_and_cut(edge_weight, height, width, root) -> (parent, order, cut)
//   The results of grid_tree and of tree_cut (scan.h) in fewer kernels. Only devices with tree_cut have it.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

namespace grootvl {

enum class Metric { kCosine, kEuclidean, kManhattan };

inline Metric parse_metric(c10::string_view name) {
  if (name == "cosine") {
    return Metric::kCosine;
  }
  TORCH_CHECK_VALUE(
      name == "euclidean" || name == "manhattan",
      "metric must be one of cosine, euclidean, manhattan, got '",
      name,
      "'");
  return name == "euclidean" ? Metric::kEuclidean : Metric::kManhattan;
}

inline int64_t count_edges(int64_t height, int64_t width) {
  return (height - 1) * width + height * (width - 1);
}

inline void check_feature(const at::Tensor& feature) {
  TORCH_CHECK_VALUE(
      feature.dim() == 4 && feature.size(2) > 0 && feature.size(3) > 0,
      "feature must have shape (B, C, H, W) with H and W at least 1, got ",
      feature.sizes());
}

inline void check_edge_weight(const at::Tensor& edge_weight, int64_t height, int64_t width, int64_t root) {
  TORCH_CHECK_TYPE(
      edge_weight.scalar_type() == at::kFloat, "edge_weight must be float32, got ", edge_weight.scalar_type());
  // Kernels pack a vertex and two more bits into an int32.
  TORCH_CHECK_VALUE(
      height > 0 && width > 0 && height < (int64_t{1} << 28) / width,
      "height and width must be at least 1, with fewer than 2^28 vertices, got ",
      height,
      " and ",
      width);
  TORCH_CHECK_VALUE(
      edge_weight.dim() == 2 && edge_weight.size(1) == count_edges(height, width),
      "edge_weight must have shape (B, ",
      count_edges(height, width),
      ") for height ",
      height,
      " and width ",
      width,
      ", got ",
      edge_weight.sizes());
  TORCH_CHECK_VALUE(
      0 <= root && root < height * width, "root must be a vertex of 0..", height * width - 1, ", got ", root);
}

}  // namespace grootvl
