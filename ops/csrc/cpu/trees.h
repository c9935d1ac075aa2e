// Validates the trees of a batch: with an invalid tree, scans would access memory out of bounds.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <vector>

#include "cpu/types.h"

namespace grootvl::cpu {

// Whether the order has every vertex once, the root first, and each parent before its children.
inline bool is_topological(const Tree& tree) {
  std::vector<uint8_t> seen(tree.vertices, 0);
  const auto inside = [&](int32_t v) { return 0 <= v && v < tree.vertices; };
  for (int64_t i = 0; i < tree.vertices; ++i) {
    const int32_t v = tree.order[i];
    if (!inside(v) || !inside(tree.parent[v]) || seen[v]) {
      return false;
    }
    const int32_t p = tree.parent[v];
    if (i == 0 ? p != v : !seen[p]) {
      return false;
    }
    seen[v] = 1;
  }
  return true;
}

// The validated trees of a batch.
class Trees {
 public:
  Trees(const at::Tensor& parent, const at::Tensor& order) : parent_(parent.contiguous()), order_(order.contiguous()) {
    std::atomic<int64_t> bad{-1};
    at::parallel_for(0, parent_.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        if (!is_topological((*this)[image])) {
          bad = image;
        }
      }
    });
    TORCH_CHECK_VALUE(
        bad < 0,
        "parent and order must be a rooted tree with every parent before its children, as grid_tree returns it; "
        "those of image ",
        bad.load(),
        " are not");
  }

  Tree operator[](int64_t image) const {
    const int64_t vertices = parent_.size(1);
    return {
        parent_.const_data_ptr<int32_t>() + image * vertices,
        order_.const_data_ptr<int32_t>() + image * vertices,
        vertices};
  }

 private:
  at::Tensor parent_, order_;
};

}  // namespace grootvl::cpu
