// The row-wise steps after the scan of a selective layer, y = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate), and
// their backward pass. A row stays in the registers of its lanes from the first load to the last store.
#pragma once

#include "cuda/collectives.cuh"
#include "cuda/packs.cuh"
#include "cuda/selective_input.cuh"

namespace grootvl::cuda {

// Packs per lane. Kernels are compiled for three block sizes, since the maximal number of threads limits their
// registers: for rows that share warps, for rows with a block each, and for the longest rows.
constexpr int kLanePacks = 3, kRowThreads = 128, kWideRowThreads = 256, kMostRowLanes = 1024;

// The distribution of a row over lanes: pack i of lane l is the (i * lanes + l)-th of the row. Rows of up to 32 lanes
// share warps; longer rows have a block each.
template <int kPack>
struct RowLanes {
  int lanes, lane, row_in_block;
  int64_t channels;

  __device__ RowLanes(int lanes, int64_t channels)
      : lanes(lanes),
        lane(static_cast<int>(threadIdx.x) % lanes),
        row_in_block(static_cast<int>(threadIdx.x) / lanes),
        channels(channels) {}

  __device__ int64_t channel(int i) const {
    return (static_cast<int64_t>(i) * lanes + lane) * kPack;
  }
  __device__ bool has(int i) const {
    return channel(i) < channels;
  }
  // Loads this lane's channels from memory of any type; 0 beyond the last channel.
  template <typename T>
  __device__ void load(const T* row, Pack<T, kPack> (&values)[kLanePacks]) const {
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      values[i] = has(i) ? load_pack<kPack>(row + channel(i)) : Pack<T, kPack>{};
    }
  }
};

// Sums over the lanes of a row, the same in all of them. kWide: over the whole block, called by all its threads.
template <bool kWide, int kCount, typename acc_t>
__device__ void row_sums(acc_t (&values)[kCount], int lanes) {
  for (int offset = (kWide ? kWarpSize : lanes) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] += __shfl_xor_sync(kAllLanes, values[i], offset);
    }
  }
  if (kWide) {
    __shared__ acc_t of_warps[kCount][kMostRowLanes / kWarpSize];
    if (lane_index() == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        of_warps[i][warp_index()] = values[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = 0;
      for (int warp = 0; warp < warps_in_block(); ++warp) {
        values[i] += of_warps[i][warp];
      }
    }
    // The next call must not overwrite the sums before all threads have read them.
    __syncthreads();
  }
}

// The parameters, (D) each.
template <typename acc_t>
struct RowWeights {
  const acc_t *skip, *h_weight, *h_bias, *out_weight, *out_bias;
};

template <typename T, typename between_t, typename acc_t>
struct RowInputs {
  Rows<const T> x, gate, c;
  Rows<const between_t> h;
  RowWeights<acc_t> weights;
  int64_t rows, channels;
  acc_t eps;
};

// Subtracts the mean of a row and divides by its standard deviation. Returns 1 / standard deviation.
template <bool kWide, typename acc_t, int kPack>
__device__ acc_t standardise(Pack<acc_t, kPack> (&values)[kLanePacks], const RowLanes<kPack>& place, acc_t eps) {
  acc_t mean[1] = {}, square[1] = {};
#pragma unroll
  for (int i = 0; i < kLanePacks; ++i) {
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      mean[0] += values[i][p];
    }
  }
  row_sums<kWide>(mean, place.lanes);
  mean[0] /= place.channels;
#pragma unroll
  for (int i = 0; i < kLanePacks; ++i) {
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      values[i][p] = place.has(i) ? values[i][p] - mean[0] : 0;
      square[0] += values[i][p] * values[i][p];
    }
  }
  row_sums<kWide>(square, place.lanes);
  const acc_t scale = rsqrt(square[0] / place.channels + eps);
#pragma unroll
  for (int i = 0; i < kLanePacks; ++i) {
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      values[i][p] *= scale;
    }
  }
  return scale;
}

// The backward pass of standardise for one channel, from the gradient and the means of it and of it times the row.
template <typename acc_t>
__device__ acc_t standardise_backward(acc_t grad, acc_t standard, acc_t mean, acc_t mean_product, acc_t scale) {
  return scale * (grad - mean - standard * mean_product);
}

// Visits the rows of this lane one by one; lanes without a row process the last row and write nothing.
template <int kPack, typename Visit>
__device__ void for_each_row(const RowLanes<kPack>& place, int64_t rows, const Visit& visit) {
  const int rows_in_block = static_cast<int>(blockDim.x) / place.lanes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * rows_in_block;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_in_block; first < rows; first += stride) {
    const int64_t row = first + place.row_in_block;
    visit(min(row, rows - 1), row < rows);
  }
}

template <int kMostThreads, typename T, typename between_t, typename acc_t, int kPack>
__global__ void __launch_bounds__(kMostThreads)
    output_kernel(RowInputs<T, between_t, acc_t> in, T* __restrict__ y, int lanes) {
  constexpr bool kWide = kMostThreads > kRowThreads;
  using Values = Pack<acc_t, kPack>;
  const RowLanes<kPack> place(lanes, in.channels);
  Values skip[kLanePacks], h_weight[kLanePacks], h_bias[kLanePacks], out_weight[kLanePacks], out_bias[kLanePacks];
  place.load(in.weights.skip, skip);
  place.load(in.weights.h_weight, h_weight);
  place.load(in.weights.h_bias, h_bias);
  place.load(in.weights.out_weight, out_weight);
  place.load(in.weights.out_bias, out_bias);
  for_each_row(place, in.rows, [&](int64_t row, bool is_own) {
    Pack<T, kPack> x[kLanePacks], gate[kLanePacks];
    Pack<between_t, kPack> h[kLanePacks];
    place.load(in.h[row], h);
    place.load(in.x[row], x);
    place.load(in.gate[row], gate);
    const acc_t c = static_cast<acc_t>(in.c[row][0]);
    Values values[kLanePacks];
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      values[i] = convert<acc_t>(h[i]);
    }
    standardise<kWide>(values, place, in.eps);
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        const acc_t normed = values[i][p] * h_weight[i][p] + h_bias[i][p];
        values[i][p] = normed * c + skip[i][p] * static_cast<acc_t>(x[i][p]);
      }
    }
    standardise<kWide>(values, place, in.eps);
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      if (is_own && place.has(i)) {
        store_pack(y + row * in.channels + place.channel(i), make_pack<acc_t, kPack>([&](int p) {
                     const acc_t of_gate = static_cast<acc_t>(gate[i][p]);
                     return (values[i][p] * out_weight[i][p] + out_bias[i][p]) * of_gate * sigmoid(of_gate);
                   }));
      }
    }
  });
}

enum OutputSum : int { kSkip, kHNormWeight, kHNormBias, kOutNormWeight, kOutNormBias, kOutputSums };

template <typename T, typename between_t, typename acc_t>
struct OutputGradients {
  Rows<T> gate;
  T* c;
  between_t *mixed, *h;
  // (blocks, kOutputSums, channels).
  acc_t* sums;
};

// The sums of a lane over its rows, for each of its channels. Kernels for rows that share warps are bound by memory
// latency, so their sums are in shared memory, which leaves registers to more blocks; otherwise they are in registers.
template <bool kWide, typename acc_t, int kPack>
class ChannelSums {
  using Values = Pack<acc_t, kPack>;

  Values kept[kWide ? kOutputSums : 1][kLanePacks] = {};

  __device__ Values& at(int which, int i) {
    if constexpr (kWide) {
      return kept[which][i];
    } else {
      return shared_memory_as<Values>()[(which * kLanePacks + i) * kRowThreads + static_cast<int>(threadIdx.x)];
    }
  }

 public:
  static constexpr int64_t kSharedBytes = kWide ? 0 : kOutputSums * kLanePacks * kRowThreads * sizeof(Values);

  __device__ ChannelSums() {
    if constexpr (!kWide) {
#pragma unroll
      for (int k = 0; k < kOutputSums * kLanePacks; ++k) {
        at(k / kLanePacks, k % kLanePacks) = {};
      }
    }
  }

  __device__ void add(OutputSum which, int i, const Values& values) {
    Values& sum = at(which, i);
    sum = make_pack<acc_t, kPack>([&](int p) { return sum[p] + values[p]; });
  }

  // Adds up the rows of the block in order and writes the sums to rows of channels. Called by all its threads.
  __device__ void store(const RowLanes<kPack>& place, acc_t* to) {
    if constexpr (!kWide) {
      __syncthreads();
    }
    if (place.row_in_block > 0) {
      return;
    }
#pragma unroll
    for (int which = 0; which < kOutputSums; ++which) {
#pragma unroll
      for (int i = 0; i < kLanePacks; ++i) {
        Values sum = at(which, i);
        if constexpr (!kWide) {
          for (int other = place.lane + place.lanes; other < kRowThreads; other += place.lanes) {
            const Values of_row = shared_memory_as<Values>()[(which * kLanePacks + i) * kRowThreads + other];
            sum = make_pack<acc_t, kPack>([&](int p) { return sum[p] + of_row[p]; });
          }
        }
        if (place.has(i)) {
          store_pack(to + which * place.channels + place.channel(i), sum);
        }
      }
    }
  }
};

// The minimal number of blocks per multiprocessor: 16 warps for float32 rows that share warps.
template <int kMostThreads, typename acc_t>
constexpr int kOutputBlocks = kMostThreads == kRowThreads && sizeof(acc_t) == 4 ? 4 : 1;

// The backward pass of output_kernel; `mixed` is the input of its second layer norm. The rows of a block, and so its
// sums, depend on the number of rows only.
template <int kMostThreads, typename T, typename between_t, typename acc_t, int kPack>
__global__ void __launch_bounds__(kMostThreads, kOutputBlocks<kMostThreads, acc_t>) output_backward_kernel(
    RowInputs<T, between_t, acc_t> in, Rows<const T> grad_y, OutputGradients<T, between_t, acc_t> grads, int lanes) {
  constexpr bool kWide = kMostThreads > kRowThreads;
  using Values = Pack<acc_t, kPack>;
  const RowLanes<kPack> place(lanes, in.channels);
  ChannelSums<kWide, acc_t, kPack> sums;
  for_each_row(place, in.rows, [&](int64_t row, bool is_own) {
    const acc_t* const weights[] = {
        in.weights.skip, in.weights.h_weight, in.weights.h_bias, in.weights.out_weight, in.weights.out_bias};
    const auto weight = [&](OutputSum which, int i) {
      return place.has(i) ? load_pack<kPack>(weights[which] + place.channel(i)) : Values{};
    };
    const auto write = [&](auto* to, int i, const Values& values) {
      if (is_own && place.has(i)) {
        store_pack(to + place.channel(i), values);
      }
    };
    Pack<T, kPack> x[kLanePacks], gate[kLanePacks], of_y[kLanePacks];
    Pack<between_t, kPack> stored_h[kLanePacks];
    place.load(in.h[row], stored_h);
    place.load(in.x[row], x);
    place.load(in.gate[row], gate);
    place.load(grad_y[row], of_y);
    const acc_t c = static_cast<acc_t>(in.c[row][0]);
    Values h[kLanePacks], mixed[kLanePacks], grad[kLanePacks];
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      h[i] = convert<acc_t>(stored_h[i]);
    }
    const acc_t h_scale = standardise<kWide>(h, place, in.eps);
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      const Values h_weight = weight(kHNormWeight, i), h_bias = weight(kHNormBias, i), skip = weight(kSkip, i);
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        mixed[i][p] = (h[i][p] * h_weight[p] + h_bias[p]) * c + skip[p] * static_cast<acc_t>(x[i][p]);
      }
    }
    const acc_t mixed_scale = standardise<kWide>(mixed, place, in.eps);

    // The means of a gradient and of it times the row, twice; the gradient of c.
    acc_t means[2] = {};
    // Rows of another lane group are excluded from the sums.
    const acc_t own = is_own ? 1 : 0;
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      const Values out_weight = weight(kOutNormWeight, i), out_bias = weight(kOutNormBias, i);
      Values of_weight, of_bias;
      write(grads.gate[row], i, make_pack<acc_t, kPack>([&](int p) {
              const acc_t of_gate = static_cast<acc_t>(gate[i][p]), sigma = sigmoid(of_gate);
              const acc_t out = static_cast<acc_t>(of_y[i][p]) * sigma;
              const acc_t normed = mixed[i][p] * out_weight[p] + out_bias[p];
              const acc_t of_normed = out * of_gate;
              of_weight[p] = own * of_normed * mixed[i][p];
              of_bias[p] = own * of_normed;
              grad[i][p] = of_normed * out_weight[p];
              means[0] += grad[i][p];
              means[1] += grad[i][p] * mixed[i][p];
              return out * normed * (1 + of_gate * (1 - sigma));
            }));
      sums.add(kOutNormWeight, i, of_weight);
      sums.add(kOutNormBias, i, of_bias);
    }
    row_sums<kWide>(means, place.lanes);
    means[0] /= in.channels;
    means[1] /= in.channels;

    acc_t h_means[3] = {};
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      const Values h_weight = weight(kHNormWeight, i), h_bias = weight(kHNormBias, i);
      const Values of_mixed = make_pack<acc_t, kPack>([&](int p) {
        return place.has(i) ? standardise_backward(grad[i][p], mixed[i][p], means[0], means[1], mixed_scale) : 0;
      });
      write(grads.mixed + row * in.channels, i, of_mixed);
      Values of_skip, of_weight, of_bias;
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        const acc_t of_normed = own * of_mixed[p] * c;
        of_skip[p] = own * of_mixed[p] * static_cast<acc_t>(x[i][p]);
        of_weight[p] = of_normed * h[i][p];
        of_bias[p] = of_normed;
        grad[i][p] = of_mixed[p] * c * h_weight[p];
        h_means[0] += grad[i][p];
        h_means[1] += grad[i][p] * h[i][p];
        h_means[2] += of_mixed[p] * (h[i][p] * h_weight[p] + h_bias[p]);
      }
      sums.add(kSkip, i, of_skip);
      sums.add(kHNormWeight, i, of_weight);
      sums.add(kHNormBias, i, of_bias);
    }
    row_sums<kWide>(h_means, place.lanes);
    if (is_own && place.lane == 0) {
      grads.c[row] = static_cast<T>(h_means[2]);
    }
    h_means[0] /= in.channels;
    h_means[1] /= in.channels;
#pragma unroll
    for (int i = 0; i < kLanePacks; ++i) {
      write(grads.h + row * in.channels, i, make_pack<acc_t, kPack>([&](int p) {
              return standardise_backward(grad[i][p], h[i][p], h_means[0], h_means[1], h_scale);
            }));
    }
  });
  sums.store(place, grads.sums + static_cast<int64_t>(blockIdx.x) * kOutputSums * in.channels);
}

}  // namespace grootvl::cuda
