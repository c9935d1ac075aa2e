// The backward pass of SelectiveInput: from the gradients of the scan's values and decays to those of what they are
// made of.
#pragma once

#include "cuda/selective_input.cuh"

namespace grootvl::cuda {

enum InputSum : int { kBias, kRate, kInputSums };

// Rows that a group has on their way at once, and the blocks that a multiprocessor shall have room for.
constexpr int kInputRows = 3;

template <typename acc_t>
constexpr int kInputBlocks = sizeof(acc_t) == 4 ? 2 : 1;

template <typename T, typename between_t, typename acc_t>
struct InputGradients {
  // Of what the second layer norm gets, of the scan's values and of its decays.
  const between_t *mixed, *value, *decay;
  const acc_t* skip;
  // The gradients of x, and of the step before its softplus.
  T* x;
  between_t* step;
  // (rows, tiles of channels): the parts of the gradient of b.
  acc_t* b;
  // (blocks of the y axis, kInputSums, channels).
  acc_t* sums;
  int64_t rows;
};

// Lanes as in a tile of the scan; blocks of the x axis are tiles of channels, those of the y axis share the rows.
template <typename T, typename between_t, typename acc_t, int kPack>
__global__ void __launch_bounds__(kTileThreads, kInputBlocks<acc_t>)
    input_backward_kernel(SelectiveInput<T, between_t, acc_t, kPack, 1> in, InputGradients<T, between_t, acc_t> grads) {
  using Values = Pack<acc_t, kPack>;
  using Stored = Pack<between_t, kPack>;
  const int64_t channels = in.step.channels;
  const LanePlace<kPack> place(channels);
  const auto of_lane = in.lane(place.channel);
  const Values skip = load_pack<kPack>(grads.skip + place.channel);
  Values sums[kInputSums] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kInputRows * kTileGroups;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kInputRows * kTileGroups; first < grads.rows;
       first += stride) {
    int64_t rows[kInputRows];
    typename SelectiveInput<T, between_t, acc_t, kPack, 1>::Raw raws[kInputRows];
    Stored mixed[kInputRows], value[kInputRows], decay[kInputRows];
    acc_t terms[kInputRows];
#pragma unroll
    for (int j = 0; j < kInputRows; ++j) {
      rows[j] = min(first + j * kTileGroups + place.group, grads.rows - 1);
      raws[j] = in.load(rows[j], place.channel, place.lane);
      const int64_t at = rows[j] * channels + place.channel;
      mixed[j] = load_pack<kPack>(grads.mixed + at);
      value[j] = load_pack<kPack>(grads.value + at);
      decay[j] = load_pack<kPack>(grads.decay + at);
      terms[j] = raws[j].dt;
    }
    Values steps[kInputRows];
    in.step.steps([&](int j) { return rows[j]; }, terms, place.channel, place.lane, of_lane.bias, steps);
#pragma unroll
    for (int j = 0; j < kInputRows; ++j) {
      const bool is_own = first + j * kTileGroups + place.group < grads.rows && place.is_active;
      const acc_t b = static_cast<acc_t>(raws[j].b);
      acc_t of_b = 0;
      Values of_x, of_step;
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        const acc_t x = static_cast<acc_t>(raws[j].x[p]), of_value = static_cast<acc_t>(value[j][p]);
        const acc_t delta = softplus(steps[j][p]);
        // The gradient of the exponent of the decay, rate * delta.
        const acc_t of_exponent = static_cast<acc_t>(decay[j][p]) * fast_exp(of_lane.rate[p] * delta);
        of_x[p] = static_cast<acc_t>(mixed[j][p]) * skip[p] + of_value * delta * b;
        of_b += of_value * delta * x;
        of_step[p] = (of_value * b * x + of_exponent * of_lane.rate[p]) * sigmoid(steps[j][p]);
        sums[kBias][p] += is_own ? of_step[p] : 0;
        sums[kRate][p] += is_own ? of_exponent * delta : 0;
      }
      of_b = is_own ? of_b : 0;
#pragma unroll
      for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
        of_b += __shfl_xor_sync(kAllLanes, of_b, offset);
      }
      if (is_own) {
        const int64_t at = rows[j] * channels + place.channel;
        store_pack(grads.x + at, of_x);
        store_pack(grads.step + at, of_step);
        if (place.lane == 0) {
          grads.b[rows[j] * gridDim.x + blockIdx.x] = of_b;
        }
      }
    }
  }
  // What the groups have, one after the other.
  acc_t* const memory = shared_memory_as<acc_t>();
#pragma unroll
  for (int s = 0; s < kInputSums; ++s) {
    Values sum = {};
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      memory[threadIdx.x] = sums[s][p];
      __syncthreads();
      for (int group = 0; group < kTileGroups; ++group) {
        sum[p] += memory[group * kRowLanes + place.lane];
      }
      __syncthreads();
    }
    if (place.group == 0 && place.is_active) {
      store_pack(grads.sums + (static_cast<int64_t>(blockIdx.y) * kInputSums + s) * channels + place.channel, sum);
    }
  }
}

}  // namespace grootvl::cuda
