// The inputs of a selective layer's scan: decays and values, computed from the low-rank step sizes as they are loaded.
#pragma once

#include <type_traits>

#include "cuda/collectives.cuh"
#include "cuda/packs.cuh"
#include "cuda/sigmoid.cuh"
#include "cuda/tiles.cuh"

namespace grootvl::cuda {

// The number of rows whose steps a group computes at once.
constexpr int kStepRows = 4;

__device__ inline float fast_exp(float x) {
  return __expf(x);
}

__device__ inline double fast_exp(double x) {
  return exp(x);
}

// log(1 + exp(x)) without a branch: max(x, 0) + log1p(e), e = exp(-|x|), with log1p(e) = 2 atanh(z), z = e / (2 + e).
// The polynomial is the best for 2 atanh(z) / z up to z = 1/3. The relative error stays below 5e-7.
__device__ inline float softplus(float x) {
  const float e = __expf(-fabsf(x));
  const float z = __fdividef(e, 2.0f + e), q = z * z;
  float series = fmaf(q, 0.3422605f, 0.39589462f);
  series = fmaf(q, series, 0.66676f);
  series = fmaf(q, series, 1.9999996f);
  return fmaf(z, series, fmaxf(x, 0.0f));
}

__device__ inline double softplus(double x) {
  // The identity above 20, as in PyTorch.
  return x > 20 ? x : log1p(exp(x));
}

// dt dt_weight^T + dt_bias: the step before its softplus.
template <typename T, typename acc_t, int kPack>
struct StepInput {
  using Values = Pack<acc_t, kPack>;

  Rows<const T> dt;
  // (D, R), (D).
  const acc_t *weight, *bias;
  int rank;
  int64_t channels;

  // The number of a row's low-rank terms that each lane loads.
  static constexpr int kTerms = 2;
  using Terms = Pack<acc_t, kTerms>;

  __device__ Terms load(int64_t row, int lane, int begin = 0) const {
    const T* const terms = dt[row];
    return make_pack<acc_t, kTerms>([&](int k) {
      const int r = begin + k * kRowLanes + lane;
      return r < rank ? static_cast<acc_t>(terms[r]) : acc_t{0};
    });
  }

  // The weights of this lane's channels, for weights().
  __device__ const acc_t* weights_of(int64_t channel) const {
    return weight + channel * rank;
  }

  // The weights of each of them for one of the low-rank terms. The caches hold them.
  __device__ Values weights(const acc_t* of_channels, int term) const {
    return make_pack<acc_t, kPack>([&](int p) { return __ldg(of_channels + (p * rank + term)); });
  }

  // Computes the steps of rows row_of(0), ..., row_of(kCount - 1) together, so that each weight is read once for all of
  // them. `terms` are the results of load. Called by whole warps.
  template <int kCount, typename RowOf>
  __device__ void steps(
      const RowOf& row_of, Terms (&terms)[kCount], int64_t channel, int lane, Values (&steps)[kCount]) const {
    const Values bias_of_lane = load_pack<kPack>(bias + channel);
    const acc_t* const of_channels = weights_of(channel);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      steps[j] = bias_of_lane;
    }
    for (int begin = 0; begin < rank; begin += kTerms * kRowLanes) {
      if (begin > 0) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          terms[j] = load(row_of(j), lane, begin);
        }
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        const int first = begin + k * kRowLanes, count = min(kRowLanes, rank - first);
#pragma unroll 1
        for (int r = 0; r < count; ++r) {
          const Values factor = weights(of_channels, first + r);
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            const acc_t term = __shfl_sync(kAllLanes, terms[j][k], r, kRowLanes);
#pragma unroll
            for (int p = 0; p < kPack; ++p) {
              steps[j][p] += term * factor[p];
            }
          }
        }
      }
    }
  }
};

// Input with one or both of two streams: delta b x, and the gradient of h, stored as between_t.
template <typename T, typename between_t, typename acc_t, int kPack, bool kHasValues, bool kHasGradients>
struct SelectiveInput {
  static constexpr int kStreams = kHasValues + kHasGradients, kGradients = kHasValues;
  using Values = Pack<acc_t, kPack>;
  using Terms = typename StepInput<T, acc_t, kPack>::Terms;

  StepInput<T, acc_t, kPack> step;
  Rows<const T> x, b;
  Rows<const between_t> grad_h;
  const acc_t* A_log;

  __device__ Values rate(int64_t channel) const {
    const Values log = load_pack<kPack>(A_log + channel);
    return make_pack<acc_t, kPack>([&](int p) { return -exp(log[p]); });
  }
  template <typename Cells>
  __device__ void copy(int64_t row, int64_t channel, const Cells& cells, int to) const {
    if constexpr (kHasValues) {
      cells.copy(x[row] + channel, 0, to);
    }
    if constexpr (kHasGradients) {
      cells.copy(grad_h[row] + channel, kGradients, to);
    }
  }
  template <typename Cells>
  __device__ void prepare(const LanePlace<kPack>& place, int64_t first_row, int rows, const Cells& cells) const {
    const Values rate_of_lane = rate(place.channel);
    for_each_batch<kStepRows>(place.group, rows, [&](const int (&of_group)[kStepRows]) {
      // Only vertices of the own group are there already. Groups without a row read that of vertex 0 instead.
      const auto row_of = [&](int j) { return first_row + (of_group[j] < rows ? cells.vertex[of_group[j]] : 0); };
      Terms terms[kStepRows];
      acc_t b_of[kStepRows];
#pragma unroll
      for (int j = 0; j < kStepRows; ++j) {
        const int64_t row_of_memory = row_of(j);
        terms[j] = step.load(row_of_memory, place.lane);
        b_of[j] = kHasValues ? static_cast<acc_t>(b[row_of_memory][0]) : 0;
      }
      Values steps[kStepRows];
      step.steps(row_of, terms, place.channel, place.lane, steps);
      // The steps above do not depend on the copies.
      __pipeline_wait_prior(0);
#pragma unroll
      for (int j = 0; j < kStepRows; ++j) {
        const int row = of_group[j];
        if (row < rows) {
          const Values delta = make_pack<acc_t, kPack>([&](int p) { return softplus(steps[j][p]); });
          if constexpr (kHasValues) {
            const auto stored = cells.template as<T>(0, row);
            cells(0, row) =
                make_pack<acc_t, kPack>([&](int p) { return delta[p] * b_of[j] * static_cast<acc_t>(stored[p]); });
          }
          if constexpr (kHasGradients && !std::is_same_v<between_t, acc_t>) {
            cells(kGradients, row) = convert<acc_t>(cells.template as<between_t>(kGradients, row));
          }
          cells.kept(row) = make_pack<acc_t, kPack>([&](int p) { return fast_exp(rate_of_lane[p] * delta[p]); });
        }
      }
    });
  }
};

}  // namespace grootvl::cuda
