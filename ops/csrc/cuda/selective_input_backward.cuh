// The output of a selective layer's backward scan: computes the gradients of the layer's inputs from those of the
// scan's values and decays, which stay in shared memory.
#pragma once

#include "cuda/piece_scan.cuh"
#include "cuda/selective_input.cuh"

namespace grootvl::cuda {

enum InputSum : int { kBias, kRate, kInputSums };

// The number of rows whose gradients a group computes at once.
constexpr int kInputRows = 2;

template <Propagation kForward, typename T, typename between_t, typename acc_t, int kPack>
struct SelectiveGradients {
  static constexpr bool kByRows = true;
  using Values = Pack<acc_t, kPack>;
  using Input = SelectiveInput<T, between_t, acc_t, kPack, true, false>;

  Input in;
  // The gradient of the second layer norm's input, which includes Ds x.
  const between_t* mixed;
  const acc_t* skip;
  // The gradients of x and of the step before its softplus.
  T* x;
  between_t* step;
  // (rows, tiles of channels): partial sums of the gradient of b.
  acc_t* b;
  // (images x tiles of rows, kInputSums, channels).
  acc_t* sums;
  int channel_tiles;

  __device__ Values of_decay(const Values& decay, const Values* sum, const Values* above_result) const {
    return gradient_of_decay<kForward>(decay, sum, above_result);
  }

  template <typename Cells>
  __device__ void take_rows(
      const LanePlace<kPack>& place, int64_t first_row, int rows, const Cells& cells, int64_t tile) const {
    const int64_t channels = in.step.channels;
    const Values rate = in.rate(place.channel), of_skip = load_pack<kPack>(skip + place.channel);
    Values of_tile[kInputSums] = {};
    for_each_batch<kInputRows>(place.group, rows, [&](const int (&of_group)[kInputRows]) {
      int64_t at[kInputRows];
      typename Input::Terms terms[kInputRows];
      Pack<T, kPack> stored[kInputRows];
      Pack<between_t, kPack> of_mixed[kInputRows];
      acc_t b_of[kInputRows];
#pragma unroll
      for (int j = 0; j < kInputRows; ++j) {
        at[j] = first_row + cells.vertex[min(of_group[j], rows - 1)];
        terms[j] = in.step.load(at[j], place.lane);
        stored[j] = load_pack<kPack>(in.x[at[j]] + place.channel);
        of_mixed[j] = load_pack<kPack>(mixed + at[j] * channels + place.channel);
        b_of[j] = static_cast<acc_t>(in.b[at[j]][0]);
      }
      Values steps[kInputRows];
      in.step.steps([&](int j) { return at[j]; }, terms, place.channel, place.lane, steps);
#pragma unroll
      for (int j = 0; j < kInputRows; ++j) {
        const int row = min(of_group[j], rows - 1);
        const bool is_own = of_group[j] < rows && place.is_active;
        const Values of_value = cells(1, row), of_decay = cells.kept(row);
        Values of_x, of_step;
        acc_t of_b = 0;
#pragma unroll
        for (int p = 0; p < kPack; ++p) {
          const acc_t x_of = static_cast<acc_t>(stored[j][p]), delta = softplus(steps[j][p]);
          // The gradient of the exponent of the decay, rate * delta.
          const acc_t of_exponent = of_decay[p] * fast_exp(rate[p] * delta);
          of_x[p] = static_cast<acc_t>(of_mixed[j][p]) * of_skip[p] + of_value[p] * delta * b_of[j];
          of_b += of_value[p] * delta * x_of;
          of_step[p] = (of_value[p] * b_of[j] * x_of + of_exponent * rate[p]) * sigmoid(steps[j][p]);
          of_tile[kBias][p] += is_own ? of_step[p] : 0;
          of_tile[kRate][p] += is_own ? of_exponent * delta : 0;
        }
        of_b = is_own ? of_b : 0;
#pragma unroll
        for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
          of_b += __shfl_xor_sync(kAllLanes, of_b, offset);
        }
        if (is_own) {
          const int64_t place_of_row = at[j] * channels + place.channel;
          store_pack(x + place_of_row, of_x);
          store_pack(step + place_of_row, of_step);
          if (place.lane == 0) {
            b[at[j] * channel_tiles + place.channel_tile] = of_b;
          }
        }
      }
    });
    store_sums(place, of_tile, sums + tile * kInputSums * channels);
  }

 private:
  // Adds the sums of the block's groups in a fixed order.
  __device__ void store_sums(const LanePlace<kPack>& place, Values (&of_tile)[kInputSums], acc_t* to) const {
    __shared__ acc_t of_warps[kTileThreads / kWarpSize][kInputSums][kRowLanes * kPack];
#pragma unroll
    for (int s = 0; s < kInputSums; ++s) {
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        acc_t& sum = of_tile[s][p];
#pragma unroll
        for (int offset = kRowLanes; offset < kWarpSize; offset *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        if (lane_index() < kRowLanes) {
          of_warps[warp_index()][s][place.lane * kPack + p] = sum;
        }
      }
    }
    __syncthreads();
    if (place.group < kInputSums && place.is_active) {
      const Values sum = make_pack<acc_t, kPack>([&](int p) {
        acc_t of_block = 0;
        for (int warp = 0; warp < kTileThreads / kWarpSize; ++warp) {
          of_block += of_warps[warp][place.group][place.lane * kPack + p];
        }
        return of_block;
      });
      store_pack(to + place.group * in.step.channels + place.channel, sum);
    }
  }
};

}  // namespace grootvl::cuda
