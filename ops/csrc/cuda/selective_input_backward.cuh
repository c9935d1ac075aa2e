// The output of a selective layer's backward scan: computes the gradients of the layer's inputs from those of the
// scan's values and decays, which stay in shared memory. If the rank of the step sizes is small, the gradients of the
// steps stay there too, until their products with the low-rank terms and with the weights have been summed.
#pragma once

#include "cuda/piece_scan.cuh"
#include "cuda/selective_input.cuh"

namespace grootvl::cuda {

enum InputSum : int { kBias, kRate, kInputSums };

// The number of rows whose gradients, and whose products with the weights, a group computes at once.
constexpr int kInputRows = 2, kProductRows = 2;

// The largest rank of the step sizes whose products are summed in the tile: a row's terms fit into the memory of one of
// its streams, and the partial sums take less traffic than the gradients of the steps, which are written once and read
// twice otherwise.
template <int kPack>
constexpr int kMostSummedRank = kRowLanes * kPack;

template <Propagation kForward, typename T, typename between_t, typename acc_t, int kPack>
struct SelectiveGradients {
  static constexpr bool kByRows = true;
  using Values = Pack<acc_t, kPack>;
  using Input = SelectiveInput<T, between_t, acc_t, kPack, true, false>;

  Input in;
  // The gradient of the second layer norm's input, which includes Ds x.
  const between_t* mixed;
  const acc_t* skip;
  // The gradients of x and of the step before its softplus; that of the step is nullptr if its products are summed.
  T* x;
  between_t* step;
  // (rows, tiles of channels): partial sums of the gradient of b.
  acc_t* b;
  // (rows, tiles of channels, rank): partial sums of the gradient of dt, if its products are summed.
  between_t* dt;
  // (images x tiles of rows, sums_of_tile, channels): kInputSums, then the gradients of each term's weights, if summed.
  acc_t* sums;
  int sums_of_tile, channel_tiles;

  __device__ Values of_decay(const Values& decay, const Values* sum, const Values* above_result) const {
    return gradient_of_decay<kForward>(decay, sum, above_result);
  }

  template <typename Cells>
  __device__ void take_rows(
      const LanePlace<kPack>& place, int64_t first_row, int rows, const Cells& cells, int64_t tile) const {
    const int64_t channels = in.step.channels;
    const Values rate = in.rate(place.channel), of_skip = load_pack<kPack>(skip + place.channel);
    Values sums_of_lane[kInputSums] = {};
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
        const bool has_row = of_group[j] < rows, is_own = has_row && place.is_active;
        // Another group may be overwriting what is kept of the last row.
        const Values of_value = cells(1, row), of_decay = has_row ? cells.kept(row) : Values{};
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
          sums_of_lane[kBias][p] += is_own ? of_step[p] : 0;
          sums_of_lane[kRate][p] += is_own ? of_exponent * delta : 0;
        }
        of_b = sum_over_lanes<kRowLanes>(is_own ? of_b : 0);
        if (is_own) {
          const int64_t place_of_row = at[j] * channels + place.channel;
          store_pack(x + place_of_row, of_x);
          if (place.lane == 0) {
            b[at[j] * channel_tiles + place.channel_tile] = of_b;
          }
          if (step != nullptr) {
            store_pack(step + place_of_row, of_step);
          }
        }
        if (step == nullptr && has_row) {
          cells.kept(row) = place.is_active ? of_step : Values{};
        }
      }
    });
    acc_t* const to = sums + tile * sums_of_tile * channels;
    store_sums(place, sums_of_lane, to);
    if (step == nullptr) {
      multiply_by_weights(place, first_row, rows, cells);
      multiply_by_terms(place, rows, cells, to + kInputSums * channels);
    }
  }

 private:
  // The channels of a tile.
  static constexpr int kWidth = kRowLanes * kPack, kWarps = kTileThreads / kWarpSize;
  static_assert(int{kInputSums} <= kRowLanes);

  // Some sums of a tile's channels by each warp of the block.
  struct WarpSums {
    acc_t of[kWarps][kRowLanes][kWidth];

    __device__ acc_t total(int which, int channel) const {
      acc_t sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        sum += of[warp][which][channel];
      }
      return sum;
    }
  };

  // Several uses share this memory; a barrier must separate them.
  static __device__ WarpSums& warp_sums() {
    __shared__ WarpSums sums;
    return sums;
  }

  // For each row, sums the products of the gradient of the step, which is kept, with the weights of each term over the
  // channels of the tile. Stores the terms in cells that are not needed any more.
  template <typename Cells>
  __device__ void multiply_by_weights(
      const LanePlace<kPack>& place, int64_t first_row, int rows, const Cells& cells) const {
    const int rank = in.step.rank;
    const acc_t* const of_channels = in.step.weights_of(place.channel);
    for_each_batch<kProductRows>(place.group, rows, [&](const int (&of_group)[kProductRows]) {
      int64_t at[kProductRows];
      Values of_step[kProductRows];
#pragma unroll
      for (int j = 0; j < kProductRows; ++j) {
        const int row = min(of_group[j], rows - 1);
        at[j] = first_row + cells.vertex[row];
        of_step[j] = cells.kept(row);
      }
      for (int first = 0; first < rank; first += kRowLanes) {
        acc_t products[kProductRows][kRowLanes] = {};
#pragma unroll
        for (int k = 0; k < kRowLanes; ++k) {
          if (first + k < rank) {
            const Values weights = in.step.weights(of_channels, first + k);
#pragma unroll
            for (int j = 0; j < kProductRows; ++j) {
#pragma unroll
              for (int p = 0; p < kPack; ++p) {
                products[j][k] += of_step[j][p] * weights[p];
              }
            }
          }
        }
        const int term = first + place.lane;
#pragma unroll
        for (int j = 0; j < kProductRows; ++j) {
          const acc_t sum = scattered_sum(products[j], place.lane);
          if (of_group[j] < rows && term < rank) {
            dt[(at[j] * channel_tiles + place.channel_tile) * rank + term] = static_cast<between_t>(sum);
            cells.of_lanes(0, of_group[j])[term] = static_cast<acc_t>(in.step.dt[at[j]][term]);
          }
        }
      }
    });
  }

  // The sum over the lanes of a row of their values for this lane.
  static __device__ acc_t scattered_sum(const acc_t (&values)[kRowLanes], int lane) {
    static_assert(kRowLanes == 4);
    const bool upper = lane & 2, odd = lane & 1;
    const acc_t even_sum =
        (upper ? values[2] : values[0]) + __shfl_xor_sync(kAllLanes, upper ? values[0] : values[2], 2);
    const acc_t odd_sum =
        (upper ? values[3] : values[1]) + __shfl_xor_sync(kAllLanes, upper ? values[1] : values[3], 2);
    return (odd ? odd_sum : even_sum) + __shfl_xor_sync(kAllLanes, odd ? even_sum : odd_sum, 1);
  }

  // Sums the products of the gradients of the steps with the terms over the rows of the tile, kRowLanes terms at once.
  // A thread has one channel and every kParts-th row.
  template <typename Cells>
  __device__ void multiply_by_terms(const LanePlace<kPack>& place, int rows, const Cells& cells, acc_t* to) const {
    WarpSums& of_warps = warp_sums();
    constexpr int kParts = kTileThreads / kWidth;
    const int own = static_cast<int>(threadIdx.x) % kWidth, part = static_cast<int>(threadIdx.x) / kWidth;
    const int64_t channels = in.step.channels, channel = int64_t{place.channel_tile} * kWidth + own;
    // All rows are kept, and no thread reads the sums before.
    __syncthreads();
    for (int first = 0; first < in.step.rank; first += kRowLanes) {
      acc_t sums_of_terms[kRowLanes] = {};
      for (int row = part; row < rows; row += kParts) {
        const acc_t of_step = cells.of_lanes(Cells::kKept, row)[own];
        const auto terms = load_pack<kRowLanes>(cells.of_lanes(0, row) + first);
#pragma unroll
        for (int k = 0; k < kRowLanes; ++k) {
          sums_of_terms[k] += of_step * terms[k];
        }
      }
#pragma unroll
      for (int k = 0; k < kRowLanes; ++k) {
#pragma unroll
        for (int offset = kWidth; offset < kWarpSize; offset *= 2) {
          sums_of_terms[k] += __shfl_xor_sync(kAllLanes, sums_of_terms[k], offset);
        }
        if (lane_index() < kWidth) {
          of_warps.of[warp_index()][k][own] = sums_of_terms[k];
        }
      }
      __syncthreads();
      if (part < kRowLanes && first + part < in.step.rank && channel < channels) {
        to[(first + part) * channels + channel] = of_warps.total(part, own);
      }
      __syncthreads();
    }
  }

  // Adds the sums of the block's groups in a fixed order. Called by all its threads.
  __device__ void store_sums(const LanePlace<kPack>& place, Values (&of_lane)[kInputSums], acc_t* to) const {
    WarpSums& of_warps = warp_sums();
#pragma unroll
    for (int s = 0; s < kInputSums; ++s) {
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        acc_t& sum = of_lane[s][p];
#pragma unroll
        for (int offset = kRowLanes; offset < kWarpSize; offset *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        if (lane_index() < kRowLanes) {
          of_warps.of[warp_index()][s][place.lane * kPack + p] = sum;
        }
      }
    }
    __syncthreads();
    if (place.group < kInputSums && place.is_active) {
      const Values sum =
          make_pack<acc_t, kPack>([&](int p) { return of_warps.total(place.group, place.lane * kPack + p); });
      store_pack(to + place.group * in.step.channels + place.channel, sum);
    }
  }
};

}  // namespace grootvl::cuda
