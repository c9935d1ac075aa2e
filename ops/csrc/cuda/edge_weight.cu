// CUDA kernel of the edge weights: a warp computes those of a block of vertices. The order of all sums is fixed.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "cuda/collectives.cuh"
#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "tree.h"

namespace grootvl::cuda {

namespace {

// The rows of a warp's block of vertices. Lanes that share a vertex sum this many rows at once.
constexpr int kRows = 8;
constexpr int kThreads = 128;

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

// Adds up each row's values over kLanes neighbouring lanes, in the order of sum_over_lanes. Returns the sum
// of row lane % kLanes / (kLanes / kRows): each exchange halves the rows that a lane keeps.
template <int kLanes, typename acc_t>
__device__ acc_t sum_rows(acc_t (&values)[kRows]) {
  static_assert(kLanes >= kRows);
  int rows = kRows;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    if (rows > 1) {
      rows /= 2;
      const bool keeps_upper = lane_index() & offset;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        const acc_t kept = keeps_upper ? values[r + rows] : values[r];
        const acc_t given = keeps_upper ? values[r] : values[r + rows];
        values[r] = kept + __shfl_xor_sync(kAllLanes, given, offset);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
    }
  }
  return values[0];
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

// Warps: images x runs of kRows rows x groups of columns. kLanes lanes share a column: each adds up its channels in all
// rows and loads those of a step at once. The right neighbour's channels come from the L1 cache, since other lanes load
// them too. Beyond the image, the nearest vertex stands in for a missing one, and its sums are not used.
template <Metric metric, int kLanes, int kPack, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads, sizeof(acc_t) == 4 ? 4 : 1) edge_weight_kernel(
    const scalar_t* __restrict__ feature,
    int64_t warps,
    int64_t channels,
    int height,
    int width,
    bool log,
    float* __restrict__ weight) {
  constexpr int kColumns = kWarpSize / kLanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps_in_block() + warp_index();
  if (warp >= warps) {
    return;
  }
  const int groups = divide_up(width, kColumns), runs = divide_up(height, kRows);
  const int top = static_cast<int>(warp / groups % runs) * kRows;
  const int own_column = static_cast<int>(warp % groups) * kColumns + lane_index() / kLanes;
  const int column = min(own_column, width - 1);
  const int64_t image = warp / groups / runs, vertices = static_cast<int64_t>(height) * width;
  const scalar_t* const features = feature + (image * vertices + column) * channels;
  const int64_t to_right = column + 1 < width ? channels : 0, row_stride = width * channels;

  // Per row, the sums of terms with the neighbours to the right and below, the square of the vertex and that of its
  // right neighbour; the square below the last row.
  acc_t right[kRows] = {}, below[kRows] = {}, square[kRows] = {}, square_right[kRows] = {}, square_last = 0;
  for (int64_t c = lane_index() % kLanes * kPack; c < channels; c += kLanes * kPack) {
    Pack<scalar_t, kPack> of_own[kRows + 1], of_right[kRows];
#pragma unroll
    for (int r = 0; r <= kRows; ++r) {
      const scalar_t* const at = features + min(top + r, height - 1) * row_stride + c;
      of_own[r] = load_pack<kPack>(at);
      if (r < kRows) {
        of_right[r] = load_pack<kPack>(at + to_right);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const acc_t f = static_cast<acc_t>(of_own[r][i]);
        const acc_t beside = static_cast<acc_t>(of_right[r][i]);
        right[r] += term<metric>(f, beside);
        below[r] += term<metric>(f, static_cast<acc_t>(of_own[r + 1][i]));
        if constexpr (metric == Metric::kCosine) {
          square[r] += f * f;
          square_right[r] += beside * beside;
        }
      }
    }
    if constexpr (metric == Metric::kCosine) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const acc_t f = static_cast<acc_t>(of_own[kRows][i]);
        square_last += f * f;
      }
    }
  }

  // From here on, kLanes / kRows lanes have the same vertex.
  constexpr int kCopies = kLanes / kRows;
  const int row = lane_index() % kLanes / kCopies, y = top + row;
  const acc_t of_right = sum_rows<kLanes>(right), of_below = sum_rows<kLanes>(below);
  acc_t own_norm = 0, right_norm = 0, below_norm = 0;
  if constexpr (metric == Metric::kCosine) {
    own_norm = norm(sum_rows<kLanes>(square));
    right_norm = norm(sum_rows<kLanes>(square_right));
    const acc_t last_norm = norm(sum_over_lanes<kLanes>(square_last));
    const acc_t next_norm = __shfl_down_sync(kAllLanes, own_norm, kCopies);
    below_norm = row + 1 < kRows ? next_norm : last_norm;
  }
  if (lane_index() % kCopies == 0 && own_column < width && y < height) {
    const int64_t num_vertical = vertices - width, v = static_cast<int64_t>(y) * width + column;
    float* const vertical = weight + image * (num_vertical + vertices - height);
    if (column + 1 < width) {
      vertical[num_vertical + v - y] = to_weight<metric>(of_right, own_norm, right_norm, log);
    }
    if (y + 1 < height) {
      vertical[v] = to_weight<metric>(of_below, own_norm, below_norm, log);
    }
  }
}

template <Metric metric, typename scalar_t>
void launch_edge_weight(const at::Tensor& rows, bool log, at::Tensor& weight) {
  using acc_t = at::opmath_type<scalar_t>;
  constexpr int kPack = sizeof(scalar_t) == 8 ? 2 : 4;
  const int64_t batch = rows.size(0), channels = rows.size(1), height = rows.size(2), width = rows.size(3);
  const scalar_t* const features = rows.const_data_ptr<scalar_t>();
  const auto run = [&](auto kernel, int lanes) {
    const int64_t warps = batch * divide_up<int64_t>(height, kRows) * divide_up<int64_t>(width, kWarpSize / lanes);
    launch(
        kernel,
        blocks_in_row(divide_up<int64_t>(warps, kThreads / kWarpSize)),
        kThreads,
        0,
        features,
        warps,
        channels,
        static_cast<int>(height),
        static_cast<int>(width),
        log,
        weight.mutable_data_ptr<float>());
  };
  // The more lanes share a vertex, the more warps there are; but none should idle. The choice depends on the channels
  // only, so that an image has the same weights in every batch.
  if (!is_packed(features, channels, kPack)) {
    run(edge_weight_kernel<metric, kRows, 1, scalar_t, acc_t>, kRows);
  } else if (channels % (kWarpSize * kPack) == 0) {
    run(edge_weight_kernel<metric, kWarpSize, kPack, scalar_t, acc_t>, kWarpSize);
  } else {
    run(edge_weight_kernel<metric, kRows, kPack, scalar_t, acc_t>, kRows);
  }
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
