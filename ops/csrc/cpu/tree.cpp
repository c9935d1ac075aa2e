// CPU kernels of the edge weights, parallel over rows, and of the spanning tree, parallel over images. Results do not
// depend on the number of threads.
#include "tree.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace grootvl::cpu {

namespace {

template <typename Call>
void with_metric(Metric metric, const Call& call) {
  switch (metric) {
    case Metric::kCosine:
      return call(std::integral_constant<Metric, Metric::kCosine>());
    case Metric::kEuclidean:
      return call(std::integral_constant<Metric, Metric::kEuclidean>());
    case Metric::kManhattan:
      return call(std::integral_constant<Metric, Metric::kManhattan>());
  }
}

bool all_finite(const float* values, int64_t count) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    bad += !(std::abs(values[i]) <= std::numeric_limits<float>::max());
  }
  return bad == 0;
}

}  // namespace

at::Tensor grid_edge_weight(const at::Tensor& feature, c10::string_view metric_name, bool log) {
  const Metric metric = parse_metric(metric_name);
  check_feature(feature);
  const at::Tensor rows = feature.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t batch = feature.size(0), channels = feature.size(1), height = feature.size(2), width = feature.size(3);
  const int64_t num_edges = count_edges(height, width);
  at::Tensor weight = at::empty({batch, num_edges}, feature.options().dtype(at::kFloat));
  if (weight.numel() == 0) {
    return weight;
  }
  float* weights = weight.mutable_data_ptr<float>();
  // A task has so many rows that computing the norms of the row below its last one again costs little.
  const int64_t rows_a_task = std::max<int64_t>(8, 16384 / (width * std::max<int64_t>(channels, 1)));
  const int64_t tasks = (height + rows_a_task - 1) / rows_a_task;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, feature.scalar_type(), "grid_edge_weight", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t* features = rows.const_data_ptr<scalar_t>();
    at::parallel_for(0, batch * tasks, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> scratch(5 * width);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / tasks, first = task % tasks * rows_a_task;
        with_metric(metric, [&](auto known) {
          with_kernels([&](auto kernels) {
            decltype(kernels)::template edge_weight_rows<decltype(known)::value, scalar_t, acc_t>(
                features + image * height * width * channels,
                channels,
                height,
                width,
                first,
                std::min(first + rows_a_task, height),
                log,
                weights + image * num_edges,
                scratch.data());
          });
        });
      }
    });
  });
  return weight;
}

std::tuple<at::Tensor, at::Tensor> grid_tree(
    const at::Tensor& edge_weight, int64_t height, int64_t width, int64_t root) {
  check_edge_weight(edge_weight, height, width, root);
  const at::Tensor weight = edge_weight.contiguous();
  const int64_t batch = weight.size(0), num_edges = weight.size(1), vertices = height * width;
  at::Tensor parent = at::empty({batch, vertices}, weight.options().dtype(at::kInt));
  at::Tensor order = at::empty({batch, vertices}, weight.options().dtype(at::kInt));
  const float* weights = weight.const_data_ptr<float>();
  int32_t* parents = parent.mutable_data_ptr<int32_t>();
  int32_t* orders = order.mutable_data_ptr<int32_t>();
  std::atomic<int64_t> bad{-1};
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    TreeWorkspace workspace(height, width);
    for (int64_t first = begin; first < end; first += TreeWorkspace::kTogether) {
      const int64_t count = std::min(TreeWorkspace::kTogether, end - first);
      with_kernels([&](auto kernels) {
        using Kernels = decltype(kernels);
        for (int64_t slot = 0; slot < count; ++slot) {
          const float* of_image = weights + (first + slot) * num_edges;
          if (!all_finite(of_image, num_edges)) {
            bad = first + slot;
            return;
          }
          if (vertices > 1) {
            Kernels::spanning_tree(of_image, workspace, slot);
          }
        }
        const auto walk = count == 1 ? &Kernels::template walk<1> : &Kernels::template walk<TreeWorkspace::kTogether>;
        walk(root, workspace, parents + first * vertices, orders + first * vertices);
      });
      if (bad >= 0) {
        return;
      }
    }
  });
  TORCH_CHECK_VALUE(
      bad < 0, "edge_weight must be finite, got NaN or infinite values for image ", bad.load(), " of the batch");
  return {parent, order};
}

TORCH_LIBRARY_IMPL(grootvl, CPU, m) {
  m.impl("grid_edge_weight", &grid_edge_weight);
  m.impl("grid_tree", &grid_tree);
}

}  // namespace grootvl::cpu
