// The scan over the tree of critical vertices, between summarise and finish (piece_scan.cuh).
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/pieces.cuh"
#include "scan.h"

namespace grootvl::cuda {

// The propagations of the streams.
template <Propagation kFirst, Propagation... kSecond>
struct Streams {
  static constexpr int kCount = 1 + sizeof...(kSecond);

  static constexpr __host__ __device__ Propagation of(int stream) {
    if constexpr (kCount == 1) {
      return kFirst;
    } else {
      return stream == 0 ? kFirst : (kSecond, ...);
    }
  }
  static constexpr __host__ __device__ bool up(int stream) {
    return of(stream) != Propagation::kDown;
  }
  static constexpr __host__ __device__ bool down(int stream) {
    return of(stream) != Propagation::kUp;
  }
};

// The data passed between the kernels, a row of channels for each critical vertex of each image: value, T ("along"),
// sum u and result h of each stream, and P ("through"), which the streams share.
template <typename acc_t>
struct Summaries {
  acc_t *value, *along, *sum, *result, *through;
  int64_t rows;

  Summaries(acc_t* memory, int streams, int64_t rows, int64_t channels)
      : value(memory),
        along(value + streams * rows * channels),
        sum(along + streams * rows * channels),
        result(sum + streams * rows * channels),
        through(result + streams * rows * channels),
        rows(rows) {}

  __device__ acc_t& at(acc_t* of, int stream, int64_t row, int64_t channels, int64_t channel) const {
    return of[(stream * rows + row) * channels + channel];
  }
};

// What the pieces add to their tops, for each stream (B * L, channels): an image uses one row per piece.
template <typename acc_t, int kStreams>
struct Partials {
  acc_t* rows[kStreams];
};

// Rows that are fetched together to hide latency, since a warp works alone on its part of an image.
constexpr int kJoinBatch = 16;

// Calls use(i, fetch(i)) for all i below count in ascending or descending order; a batch is fetched while the previous
// one is used.
template <bool kAscending, typename Fetch, typename Use>
__device__ void in_batches(int count, const Fetch& fetch, const Use& use) {
  using Fetched = decltype(fetch(0));
  const auto index = [&](int i) { return kAscending ? min(i, count - 1) : max(count - 1 - i, 0); };
  Fetched next[kJoinBatch];
  if (count > 0) {
#pragma unroll
    for (int j = 0; j < kJoinBatch; ++j) {
      next[j] = fetch(index(j));
    }
  }
  for (int first = 0; first < count; first += kJoinBatch) {
    Fetched fetched[kJoinBatch];
#pragma unroll
    for (int j = 0; j < kJoinBatch; ++j) {
      fetched[j] = next[j];
    }
    if (first + kJoinBatch < count) {
#pragma unroll
      for (int j = 0; j < kJoinBatch; ++j) {
        next[j] = fetch(index(first + kJoinBatch + j));
      }
    }
#pragma unroll
    for (int j = 0; j < kJoinBatch; ++j) {
      if (first + j < count) {
        use(index(first + j), fetched[j]);
      }
    }
  }
}

// One warp per image and 32 channels. With kShared, sums and results are in shared memory, otherwise in the memory of
// the results.
template <bool kShared, typename S, typename acc_t>
__global__ void join_kernel(
    Partials<acc_t, S::kCount> partials, Pieces batch, int64_t channels, Summaries<acc_t> summaries) {
  const int64_t groups = divide_up<int64_t>(channels, kWarpSize);
  const int64_t image = blockIdx.x / groups, channel = blockIdx.x % groups * kWarpSize + lane_index();
  if (channel >= channels) {
    return;
  }
  const TreePieces tree = batch[image];
  const int64_t first_critical = image * batch.most_criticals;
  struct Step {
    acc_t value, through;
    int above;
  };
  const auto step = [&](int k, acc_t value) {
    return Step{
        value, __ldg(summaries.through + (first_critical + k) * channels + channel), __ldg(tree.critical_parent + k)};
  };
#pragma unroll
  for (int s = 0; s < S::kCount; ++s) {
    const auto of = [&](acc_t* what, int k) -> acc_t& {
      return summaries.at(what, s, first_critical + k, channels, channel);
    };
    acc_t* const column = kShared ? shared_memory_as<acc_t>() + lane_index() : &of(summaries.result, 0);
    const int64_t stride = kShared ? kWarpSize : channels;
    const auto cell = [&](int k) -> acc_t& { return column[k * stride]; };
    in_batches<true>(
        tree.criticals,
        [&](int k) { return __ldg(&of(summaries.value, k)); },
        [&](int k, acc_t value) { cell(k) = value; });
    if (S::up(s)) {
      const acc_t* const partial = partials.rows[s] + image * batch.vertices * channels + channel;
      in_batches<true>(
          tree.pieces,
          [&](int piece) { return Step{__ldg(partial + piece * channels), 0, __ldg(tree.top + piece)}; },
          [&](int, const Step& piece) { cell(piece.above) += piece.value; });
      in_batches<false>(
          tree.criticals - 1,
          [&](int i) { return step(i + 1, 0); },
          [&](int i, const Step& edge) {
            const acc_t sum = cell(i + 1);
            of(summaries.sum, i + 1) = sum;
            cell(edge.above) += edge.through * sum;
          });
    }
    if (S::down(s)) {
      in_batches<true>(
          tree.criticals - 1,
          [&](int i) { return step(i + 1, __ldg(&of(summaries.along, i + 1))); },
          [&](int i, const Step& edge) {
            const acc_t above = cell(edge.above), sum = cell(i + 1);
            const acc_t result = S::up(s) ? edge.value + sum + edge.through * (above - edge.through * sum)
                                          : edge.value + edge.through * above;
            cell(i + 1) = result;
            if (kShared) {
              of(summaries.result, i + 1) = result;
            }
          });
    }
    if (kShared) {
      of(summaries.result, 0) = cell(0);
    }
  }
}

template <typename S, typename acc_t>
void join_pieces(
    const Partials<acc_t, S::kCount>& partials,
    const Pieces& pieces,
    int64_t batch,
    int64_t channels,
    const Summaries<acc_t>& summaries) {
  const int64_t bytes = pieces.most_criticals * kWarpSize * static_cast<int64_t>(sizeof(acc_t));
  const bool in_shared_memory = bytes <= shared_memory_limit();
  launch(
      in_shared_memory ? join_kernel<true, S, acc_t> : join_kernel<false, S, acc_t>,
      blocks_in_row(batch * divide_up<int64_t>(channels, kWarpSize)),
      kWarpSize,
      in_shared_memory ? bytes : 0,
      partials,
      pieces,
      channels,
      summaries);
}

}  // namespace grootvl::cuda
