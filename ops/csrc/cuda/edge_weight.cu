// CUDA kernel of the edge weights: a warp computes those of a run of vertices. The order of all sums is fixed.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "cuda/collectives.cuh"
#include "cuda/launch.cuh"
#include "tree.h"

namespace grootvl::cuda {

namespace {

constexpr int kColumnsInBlock = 8;
// The rows of a warp's run; the norm at its first row is computed twice.
constexpr int kRowsInRun = 8;

template <typename scalar_t, int kWidth>
struct alignas(sizeof(scalar_t) * kWidth) Pack {
  scalar_t value[kWidth];
};

template <Metric metric, typename acc_t>
__device__ acc_t term(acc_t a, acc_t b) {
  if constexpr (metric == Metric::kCosine) {
    return a * b;
  } else if constexpr (metric == Metric::kEuclidean) {
    return (a - b) * (a - b);
  } else {
    return a < b ? b - a : a - b;
  }
}

// The sums of terms between a vertex and its neighbours to the right and below, and their squared norms.
template <typename acc_t>
struct Sums {
  acc_t right, below, square_right, square_below;
};

template <Metric metric, int kPack, typename scalar_t, typename acc_t>
__device__ Sums<acc_t> sum_terms(
    const scalar_t* __restrict__ own,
    const scalar_t* __restrict__ right,
    const scalar_t* __restrict__ below,
    int64_t channels) {
  using Values = Pack<scalar_t, kPack>;
  Sums<acc_t> sums = {};
  for (int64_t c = lane_index() * kPack; c < channels; c += kWarpSize * kPack) {
    const Values of_own = *reinterpret_cast<const Values*>(own + c);
    const Values of_right = *reinterpret_cast<const Values*>(right + c);
    const Values of_below = *reinterpret_cast<const Values*>(below + c);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const acc_t f = static_cast<acc_t>(of_own.value[i]);
      const acc_t r = static_cast<acc_t>(of_right.value[i]);
      const acc_t b = static_cast<acc_t>(of_below.value[i]);
      sums.right += term<metric>(f, r);
      sums.below += term<metric>(f, b);
      if constexpr (metric == Metric::kCosine) {
        sums.square_right += r * r;
        sums.square_below += b * b;
      }
    }
  }
  warp_sums(sums.right, sums.below, sums.square_right, sums.square_below);
  return sums;
}

template <typename acc_t>
__device__ acc_t norm(acc_t square) {
  const acc_t root = sqrt(square);
  const acc_t least = static_cast<acc_t>(1e-8);
  // Written such that NaN propagates.
  return root < least ? least : root;
}

// The weight of an edge; `first` and `second` are the norms of its ends (cosine only).
template <Metric metric, typename acc_t>
__device__ float to_weight(acc_t sum, acc_t first, acc_t second, bool log) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kOverflowing = 89.0f;
  acc_t exponent = sum;
  if constexpr (metric == Metric::kCosine) {
    exponent = -exponent / (first * second);
  }
  const float x = static_cast<float>(exponent);
  const float weight = log ? x : expf(x < kOverflowing ? x : kOverflowing);
  return x <= kLargest && weight <= kLargest ? weight : kLargest;
}

// Blocks: images x runs of rows x groups of columns. A warp goes down its column, row by row.
template <Metric metric, int kPack, typename scalar_t, typename acc_t>
__global__ void edge_weight_kernel(
    const scalar_t* __restrict__ feature,
    int64_t channels,
    int height,
    int width,
    bool log,
    float* __restrict__ weight) {
  const int groups = divide_up(width, kColumnsInBlock), runs = divide_up(height, kRowsInRun);
  const int group = blockIdx.x % groups, run = blockIdx.x / groups % runs;
  const int64_t image = blockIdx.x / groups / runs;
  const int column = group * kColumnsInBlock + warp_index();
  if (column >= width) {
    return;
  }
  const int64_t vertices = static_cast<int64_t>(height) * width;
  const int64_t num_vertical = vertices - width;
  float* vertical = weight + image * (num_vertical + vertices - height);
  float* horizontal = vertical + num_vertical;
  const scalar_t* features = feature + image * vertices * channels;
  const auto row_of = [&](int64_t vertex) { return features + vertex * channels; };

  const int begin = run * kRowsInRun, end = min(begin + kRowsInRun, height);
  const scalar_t* own = row_of(static_cast<int64_t>(begin) * width + column);
  acc_t own_norm = 0;
  if constexpr (metric == Metric::kCosine) {
    own_norm = norm(sum_terms<metric, kPack, scalar_t, acc_t>(own, own, own, channels).square_below);
  }
  for (int r = begin; r < end; ++r) {
    const int64_t v = static_cast<int64_t>(r) * width + column;
    const bool has_right = column + 1 < width, has_below = r + 1 < height;
    const scalar_t* below = has_below ? row_of(v + width) : own;
    const Sums<acc_t> sums =
        sum_terms<metric, kPack, scalar_t, acc_t>(own, has_right ? row_of(v + 1) : own, below, channels);
    const acc_t below_norm = norm(sums.square_below);
    if (lane_index() == 0) {
      if (has_right) {
        horizontal[v - r] = to_weight<metric>(sums.right, own_norm, norm(sums.square_right), log);
      }
      if (has_below) {
        vertical[v] = to_weight<metric>(sums.below, own_norm, below_norm, log);
      }
    }
    own = below;
    own_norm = below_norm;
  }
}

template <Metric metric, typename scalar_t>
void launch_edge_weight(const at::Tensor& rows, bool log, at::Tensor& weight) {
  using acc_t = at::opmath_type<scalar_t>;
  constexpr int kPack = 16 / sizeof(scalar_t);
  const int64_t batch = rows.size(0), channels = rows.size(1), height = rows.size(2), width = rows.size(3);
  const scalar_t* features = rows.const_data_ptr<scalar_t>();
  const bool packed = channels % kPack == 0 && reinterpret_cast<uintptr_t>(features) % 16 == 0;
  const int64_t blocks = batch * divide_up<int64_t>(height, kRowsInRun) * divide_up<int64_t>(width, kColumnsInBlock);
  launch(
      packed ? edge_weight_kernel<metric, kPack, scalar_t, acc_t> : edge_weight_kernel<metric, 1, scalar_t, acc_t>,
      blocks_in_row(blocks),
      kColumnsInBlock * kWarpSize,
      0,
      features,
      channels,
      static_cast<int>(height),
      static_cast<int>(width),
      log,
      weight.mutable_data_ptr<float>());
}

}  // namespace

at::Tensor grid_edge_weight(const at::Tensor& feature, c10::string_view metric_name, bool log) {
  const Metric metric = parse_metric(metric_name);
  check_feature(feature);
  const c10::cuda::CUDAGuard guard(feature.device());
  const at::Tensor rows = feature.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor weight =
      at::empty({feature.size(0), count_edges(feature.size(2), feature.size(3))}, feature.options().dtype(at::kFloat));
  if (weight.numel() == 0) {
    return weight;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, feature.scalar_type(), "grid_edge_weight", [&] {
    switch (metric) {
      case Metric::kCosine:
        return launch_edge_weight<Metric::kCosine, scalar_t>(rows, log, weight);
      case Metric::kEuclidean:
        return launch_edge_weight<Metric::kEuclidean, scalar_t>(rows, log, weight);
      case Metric::kManhattan:
        return launch_edge_weight<Metric::kManhattan, scalar_t>(rows, log, weight);
    }
  });
  return weight;
}

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("grid_edge_weight", &grid_edge_weight);
}

}  // namespace grootvl::cuda
