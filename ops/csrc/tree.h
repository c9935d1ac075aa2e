// Spanning trees of the 4-connected grid: what the operators promise on every device, and the checks they share.
//
// grid_edge_weight(feature, metric, log) -> weight
//   feature (B, C, H, W), any floating dtype and strides. weight (B, E) float32, E = (H-1)*W + H*(W-1): first the
//   vertical edges (v, v+W), then the horizontal edges (v, v+1), each row by row. Always finite: what overflows or is
//   not a number becomes the largest float. With log the exponents of the weights.
// grid_tree(edge_weight, height, width, root) -> (parent, order)
//   edge_weight (B, E) float32, finite. parent, order (B, L) int32, L = height * width: the minimum spanning tree, the
//   root's parent being itself, and its vertices, every parent before its children. Among equal weights the lower edge
//   index wins.
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
  // Vertices are int32, and the walk over the tree packs two more bits beside each.
  TORCH_CHECK_VALUE(
      height > 0 && width > 0 && height < (int64_t{1} << 29) / width,
      "height and width must be at least 1 with less than 2^29 vertices, got ",
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
