// What the scan of a selective layer runs over: decays and inputs, from the low-rank step sizes, as they are loaded.
#pragma once

#include "cuda/collectives.cuh"
#include "cuda/packs.cuh"
#include "cuda/tiles.cuh"

namespace grootvl::cuda {

__device__ inline float fast_exp(float x) {
  return __expf(x);
}

__device__ inline double fast_exp(double x) {
  return exp(x);
}

// log(1 + exp(x)) without a branch: max(x, 0) + log1p(e), e = exp(-|x|), with log1p(e) = 2 atanh(e / (2 + e)). The
// relative error stays below 4e-7.
__device__ inline float softplus(float x) {
  const float e = __expf(-fabsf(x));
  const float z = __fdividef(e, 2.0f + e), q = z * z;
  float series = fmaf(q, 0.18181818f, 0.22222222f);
  series = fmaf(q, series, 0.28571429f);
  series = fmaf(q, series, 0.4f);
  series = fmaf(q, series, 0.66666667f);
  series = fmaf(q, series, 2.0f);
  return fmaf(z, series, fmaxf(x, 0.0f));
}

__device__ inline double softplus(double x) {
  // As in PyTorch, the identity from 20 on.
  return x > 20 ? x : log1p(exp(x));
}

__device__ inline float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

__device__ inline double sigmoid(double x) {
  return 1 / (1 + exp(-x));
}

// dt dt_weight^T + dt_bias: the step before its softplus.
template <typename T, typename acc_t, int kPack>
struct StepInput {
  using Values = Pack<acc_t, kPack>;

  Rows<const T> dt;
  // (R, D), (D).
  const acc_t *weight, *bias;
  int rank;
  int64_t channels;

  // Of the row, what this lane brings to the first kRowLanes terms.
  __device__ acc_t load(int64_t row, int lane) const {
    return lane < rank ? static_cast<acc_t>(dt[row][lane]) : acc_t{0};
  }

  // Of several rows at once, so that a weight is read once for all: row_of(j) tells them, `first` came from load. For
  // whole warps.
  template <int kCount, typename RowOf>
  __device__ void steps(
      const RowOf& row_of,
      const acc_t (&first)[kCount],
      int64_t channel,
      int lane,
      const Values& bias_of_lane,
      Values (&steps)[kCount]) const {
    acc_t terms[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      terms[j] = first[j];
      steps[j] = bias_of_lane;
    }
    for (int begin = 0; begin < rank; begin += kRowLanes) {
      if (begin > 0) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          terms[j] = begin + lane < rank ? static_cast<acc_t>(dt[row_of(j)][begin + lane]) : acc_t{0};
        }
      }
      const int count = min(kRowLanes, rank - begin);
      for (int r = 0; r < count; ++r) {
        const Values factor = load_pack<kPack>(weight + (begin + r) * channels + channel);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const acc_t term = __shfl_sync(kAllLanes, terms[j], r, kRowLanes);
#pragma unroll
          for (int p = 0; p < kPack; ++p) {
            steps[j][p] += term * factor[p];
          }
        }
      }
    }
  }
};

// Streams: delta b x, and backwards the gradient of h, stored as between_t.
template <typename T, typename between_t, typename acc_t, int kPack, int kOfStreams>
struct SelectiveInput {
  static constexpr int kStreams = kOfStreams;
  using Values = Pack<acc_t, kPack>;

  StepInput<T, acc_t, kPack> step;
  Rows<const T> x, b;
  Rows<const between_t> grad_h;
  const acc_t* A_log;

  struct Lane {
    Values rate, bias;
    int lane;
  };
  struct Raw {
    Pack<T, kPack> x;
    Pack<between_t, kPack> grad_h;
    T b;
    acc_t dt;
  };

  __device__ Lane lane(int64_t channel) const {
    const Values log = load_pack<kPack>(A_log + channel);
    return {
        make_pack<acc_t, kPack>([&](int p) { return -exp(log[p]); }),
        load_pack<kPack>(step.bias + channel),
        static_cast<int>(threadIdx.x) % kRowLanes};
  }
  __device__ Raw load(int64_t row, int64_t channel, int lane) const {
    Raw raw;
    raw.x = load_pack<kPack>(x[row] + channel);
    if constexpr (kStreams > 1) {
      raw.grad_h = load_pack<kPack>(grad_h[row] + channel);
    }
    raw.b = b[row][0];
    raw.dt = step.load(row, lane);
    return raw;
  }
  template <int kCount, typename RowOf, typename Take>
  __device__ void use(
      const Raw (&raws)[kCount], const RowOf& row_of, const Lane& of_lane, int64_t channel, const Take& take) const {
    acc_t terms[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      terms[j] = raws[j].dt;
    }
    Values steps[kCount];
    step.steps(row_of, terms, channel, of_lane.lane, of_lane.bias, steps);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const acc_t b = static_cast<acc_t>(raws[j].b);
      const Values delta = make_pack<acc_t, kPack>([&](int p) { return softplus(steps[j][p]); });
      Values of_streams[kStreams];
      of_streams[0] = make_pack<acc_t, kPack>([&](int p) { return delta[p] * b * static_cast<acc_t>(raws[j].x[p]); });
      if constexpr (kStreams > 1) {
        of_streams[1] = convert<acc_t>(raws[j].grad_h);
      }
      take(j, of_streams, make_pack<acc_t, kPack>([&](int p) { return fast_exp(of_lane.rate[p] * delta[p]); }));
    }
  }
  __device__ const Values& decay(const Values& kept, const Lane&) const {
    return kept;
  }
};

}  // namespace grootvl::cuda
