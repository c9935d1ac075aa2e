// Scans along trees cut into pieces, in three kernels:
//   summarise  each piece from its members to its top, without what comes from below its bottom
//   join       the tree of critical vertices, up and down, from these summaries
//   finish     each piece again, now knowing its bottom's sum and its top's result
// A lane has one channel, which no other lane touches, so that nothing waits for anything inside a kernel, and every
// sum has one order.
//
// One or two streams of values run over the same decays: x alone forwards, x and the gradient of h backwards. In a
// piece with bottom b and top t let P be the product of the decays on the path from b to t ("through"), s what the
// members add to the top while b's sum is taken as 0, and T what they add to b's result ("along"). Then
//   u_t += s + P u_b                    up the tree of critical vertices
//   h_b  = T + u_b + P (h_t - P u_b)    down that tree (all);  h_b = T + P h_t (down)
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/pieces.cuh"
#include "scan.h"

namespace grootvl::cuda {

// Rows that are fetched together, for their latency; more where a single warp has an image to itself.
constexpr int kBatch = 8, kJoinBatch = 16;

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

// What passes between the kernels. `sum` (u), `result` (h) and `along` (T) have kStreams * B * most_criticals rows of
// channels, `through` (P) has B * most_criticals.
template <typename acc_t>
struct Summaries {
  acc_t *through, *along, *sum, *result;
  int64_t rows;

  __device__ acc_t& at(acc_t* of, int stream, int64_t row, int64_t channels, int64_t channel) const {
    return of[(stream * rows + row) * channels + channel];
  }
};

// Which image and channel a lane has: blocks of the x axis are images x groups of channels.
struct LanePlace {
  int64_t image, channel;

  __device__ explicit LanePlace(int64_t channels) {
    const int64_t groups = divide_up<int64_t>(channels, kWarpSize);
    image = blockIdx.x / groups;
    channel = blockIdx.x % groups * kWarpSize + lane_index();
  }
};

// Calls `fetch(i)` for all i of a batch, then `use(i, what came)` one after the other, over all i below count, from the
// first up or from the last down.
template <bool kAscending, int kCount, typename Fetch, typename Use>
__device__ void in_batches(int count, const Fetch& fetch, const Use& use) {
  using Fetched = decltype(fetch(0));
  for (int first = 0; first < count; first += kCount) {
    Fetched fetched[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = kAscending ? first + j : count - 1 - first - j;
      if (first + j < count) {
        fetched[j] = fetch(i);
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = kAscending ? first + j : count - 1 - first - j;
      if (first + j < count) {
        use(i, fetched[j]);
      }
    }
  }
}

// `Input` tells decay(row, channel) and value(stream, row, channel). `Output` has the rows in which a piece leaves what
// it adds to its top, at the row of its first member: partial(stream). They are written again by `finish`.
template <typename S, typename acc_t, typename Input, typename Output>
__global__ void summarise_kernel(
    Input input, Output output, Pieces batch, int64_t channels, Summaries<acc_t> summaries) {
  const LanePlace lane(channels);
  if (lane.channel >= channels) {
    return;
  }
  const TreePieces tree = batch[lane.image];
  const int64_t first_row = lane.image * batch.vertices;
  acc_t* column = shared_memory_as<acc_t>() + warp_index() * S::kCount * batch.most_members * kWarpSize + lane_index();
  const auto cell = [&](int stream, int place) -> acc_t& {
    return column[(stream * batch.most_members + place) * kWarpSize];
  };
  const int stride = gridDim.y * warps_in_block();
  for (int piece = blockIdx.y * warps_in_block() + warp_index(); piece < tree.pieces; piece += stride) {
    const int begin = tree.first[piece], members = tree.first[piece + 1] - begin;
    const int bottom_place = tree.bottom_place[piece];
    const int *vertex = tree.vertex + begin, *link = tree.link + begin;
#pragma unroll
    for (int s = 0; s < S::kCount; ++s) {
      if (S::up(s)) {
        in_batches<true, kBatch>(
            members,
            [&](int i) { return i == bottom_place ? 0 : input.value(s, first_row + vertex[i], lane.channel); },
            [&](int i, acc_t value) { cell(s, i) = value; });
      }
    }
    acc_t through = 1, along[S::kCount] = {}, partial[S::kCount] = {};
    int on_path = bottom_place;
    in_batches<false, kBatch>(
        members,
        [&](int i) { return input.decay(first_row + vertex[i], lane.channel); },
        [&](int i, acc_t decay) {
          const int above = link[i];
          if (i == on_path) {
#pragma unroll
            for (int s = 0; s < S::kCount; ++s) {
              if (S::up(s) && S::down(s)) {
                along[s] += through * (1 - decay) * (1 + decay) * cell(s, i);
              } else if (S::down(s)) {
                along[s] += through * input.value(s, first_row + vertex[i], lane.channel);
              }
            }
            through *= decay;
            on_path = above;
          }
#pragma unroll
          for (int s = 0; s < S::kCount; ++s) {
            if (S::up(s)) {
              const acc_t sum = decay * cell(s, i);
              if (above >= 0) {
                cell(s, above) += sum;
              } else {
                partial[s] = sum;
              }
            }
          }
        });
#pragma unroll
    for (int s = 0; s < S::kCount; ++s) {
      if (S::up(s)) {
        output.partial(s)[(first_row + vertex[0]) * channels + lane.channel] = partial[s];
      }
    }
    if (bottom_place >= 0) {
      const int64_t row = lane.image * batch.most_criticals + tree.bottom[piece];
      summaries.through[row * channels + lane.channel] = through;
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        if (S::down(s)) {
          summaries.at(summaries.along, s, row, channels, lane.channel) = along[s];
        }
      }
    }
  }
}

// One warp for an image and a group of channels. With kShared its sums and results lie in shared memory, else where the
// results end up.
template <bool kShared, typename S, typename acc_t, typename Input, typename Output>
__global__ void join_kernel(Input input, Output output, Pieces batch, int64_t channels, Summaries<acc_t> summaries) {
  const LanePlace lane(channels);
  if (lane.channel >= channels) {
    return;
  }
  const TreePieces tree = batch[lane.image];
  const int64_t first_row = lane.image * batch.vertices, first_critical = lane.image * batch.most_criticals;
  const int64_t root_row = first_row + tree.critical_vertex[0];
  struct Step {
    acc_t value, through;
    int above;
  };
  const auto step = [&](int k, acc_t value) {
    return Step{value, summaries.through[(first_critical + k) * channels + lane.channel], tree.critical_parent[k]};
  };
  acc_t at_root[S::kCount];
#pragma unroll
  for (int s = 0; s < S::kCount; ++s) {
    acc_t* const results = &summaries.at(summaries.result, s, first_critical, channels, lane.channel);
    acc_t* const column = kShared ? shared_memory_as<acc_t>() + lane_index() : results;
    const int64_t stride = kShared ? kWarpSize : channels;
    const auto cell = [&](int k) -> acc_t& { return column[k * stride]; };
    in_batches<true, kJoinBatch>(
        tree.criticals,
        [&](int k) { return input.value(s, first_row + tree.critical_vertex[k], lane.channel); },
        [&](int k, acc_t value) { cell(k) = value; });
    if (S::up(s)) {
      in_batches<true, kJoinBatch>(
          tree.pieces,
          [&](int piece) {
            const int64_t row = first_row + tree.vertex[tree.first[piece]];
            return Step{output.partial(s)[row * channels + lane.channel], 0, tree.top[piece]};
          },
          [&](int, const Step& partial) { cell(partial.above) += partial.value; });
      in_batches<false, kJoinBatch>(
          tree.criticals - 1,
          [&](int i) { return step(i + 1, 0); },
          [&](int i, const Step& edge) {
            const acc_t sum = cell(i + 1);
            summaries.at(summaries.sum, s, first_critical + i + 1, channels, lane.channel) = sum;
            cell(edge.above) += edge.through * sum;
          });
    }
    if (S::down(s)) {
      in_batches<true, kJoinBatch>(
          tree.criticals - 1,
          [&](int i) {
            return step(i + 1, summaries.at(summaries.along, s, first_critical + i + 1, channels, lane.channel));
          },
          [&](int i, const Step& edge) {
            const acc_t above = cell(edge.above), sum = cell(i + 1);
            cell(i + 1) = S::up(s) ? edge.value + sum + edge.through * (above - edge.through * sum)
                                   : edge.value + edge.through * above;
          });
      if (kShared) {
        for (int k = 0; k < tree.criticals; ++k) {
          results[k * channels] = cell(k);
        }
      }
    }
    at_root[s] = cell(0);
  }
  output.write_root(root_row * channels + lane.channel, at_root);
}

template <typename S, typename acc_t, typename Input, typename Output>
__global__ void finish_kernel(Input input, Output output, Pieces batch, int64_t channels, Summaries<acc_t> summaries) {
  const LanePlace lane(channels);
  if (lane.channel >= channels) {
    return;
  }
  const TreePieces tree = batch[lane.image];
  const int64_t first_row = lane.image * batch.vertices, first_critical = lane.image * batch.most_criticals;
  acc_t* column = shared_memory_as<acc_t>() + warp_index() * S::kCount * batch.most_members * kWarpSize + lane_index();
  const auto cell = [&](int stream, int place) -> acc_t& {
    return column[(stream * batch.most_members + place) * kWarpSize];
  };
  const int stride = gridDim.y * warps_in_block();
  for (int piece = blockIdx.y * warps_in_block() + warp_index(); piece < tree.pieces; piece += stride) {
    const int begin = tree.first[piece], members = tree.first[piece + 1] - begin;
    const int bottom_place = tree.bottom_place[piece];
    const int *vertex = tree.vertex + begin, *link = tree.link + begin;
    const auto decay_of = [&](int i) { return input.decay(first_row + vertex[i], lane.channel); };
    acc_t at_top[S::kCount] = {};
    bool any_up = false;
#pragma unroll
    for (int s = 0; s < S::kCount; ++s) {
      in_batches<true, kBatch>(
          members,
          [&](int i) { return input.value(s, first_row + vertex[i], lane.channel); },
          [&](int i, acc_t value) { cell(s, i) = value; });
      if (S::up(s) && bottom_place >= 0) {
        cell(s, bottom_place) =
            summaries.at(summaries.sum, s, first_critical + tree.bottom[piece], channels, lane.channel);
      }
      if (S::down(s)) {
        at_top[s] = summaries.at(summaries.result, s, first_critical + tree.top[piece], channels, lane.channel);
      }
      any_up |= S::up(s);
    }
    if (any_up) {
      in_batches<false, kBatch>(members, decay_of, [&](int i, acc_t decay) {
        const int above = link[i];
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          if (S::up(s) && above >= 0) {
            cell(s, above) += decay * cell(s, i);
          }
        }
      });
    }
    in_batches<true, kBatch>(members, decay_of, [&](int i, acc_t decay) {
      const int above = link[i];
      acc_t sum[S::kCount], above_result[S::kCount], result[S::kCount];
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        sum[s] = cell(s, i);
        above_result[s] = above >= 0 ? cell(s, above) : at_top[s];
        if (S::up(s) && S::down(s)) {
          result[s] = sum[s] + decay * (above_result[s] - decay * sum[s]);
        } else {
          result[s] = S::down(s) ? sum[s] + decay * above_result[s] : sum[s];
        }
        cell(s, i) = result[s];
      }
      output.write((first_row + vertex[i]) * channels + lane.channel, decay, sum, above_result, result);
    });
  }
}

// Runs the three kernels. `input` and `output` are for rows (B * L, channels); at least one row and one channel.
template <typename S, typename acc_t, typename Input, typename Output>
void scan_pieces(
    const Input& input,
    const Output& output,
    const Pieces& pieces,
    int64_t batch,
    const at::TensorOptions& options,
    int64_t channels) {
  const int64_t rows = batch * pieces.most_criticals;
  const at::Tensor memory = at::empty({(3 * S::kCount + 1) * rows * channels}, options);
  acc_t* const values = memory.mutable_data_ptr<acc_t>();
  const int64_t of_stream = S::kCount * rows * channels;
  const Summaries<acc_t> summaries{
      values,
      values + rows * channels,
      values + rows * channels + of_stream,
      values + rows * channels + 2 * of_stream,
      rows};

  constexpr int kWarps = 4;
  // Most images have about three pieces for two critical vertices; where there are more, warps take several.
  const int64_t usual_pieces = 3 * divide_up<int64_t>(pieces.most_criticals, 2) + 1;
  const int64_t bytes_a_warp = S::kCount * pieces.most_members * kWarpSize * static_cast<int64_t>(sizeof(acc_t));
  const int warps = warps_that_fit(bytes_a_warp, kWarps);
  const unsigned lanes = static_cast<unsigned>(batch * divide_up<int64_t>(channels, kWarpSize));
  const dim3 grid(lanes, static_cast<unsigned>(std::min<int64_t>(divide_up<int64_t>(usual_pieces, warps), 65535)));
  const int64_t join_bytes = pieces.most_criticals * kWarpSize * static_cast<int64_t>(sizeof(acc_t));
  const bool join_in_shared_memory = join_bytes <= shared_memory_limit();

  launch(
      summarise_kernel<S, acc_t, Input, Output>,
      grid,
      warps * kWarpSize,
      warps * bytes_a_warp,
      input,
      output,
      pieces,
      channels,
      summaries);
  launch(
      join_in_shared_memory ? join_kernel<true, S, acc_t, Input, Output> : join_kernel<false, S, acc_t, Input, Output>,
      dim3(lanes),
      kWarpSize,
      join_in_shared_memory ? join_bytes : 0,
      input,
      output,
      pieces,
      channels,
      summaries);
  launch(
      finish_kernel<S, acc_t, Input, Output>,
      grid,
      warps * kWarpSize,
      warps * bytes_a_warp,
      input,
      output,
      pieces,
      channels,
      summaries);
}

// Where a forward scan goes.
template <typename acc_t>
struct ForwardOutput {
  acc_t* h;

  __device__ acc_t* partial(int) const {
    return h;
  }
  __device__ void write(int64_t at, acc_t, const acc_t*, const acc_t*, const acc_t* result) const {
    h[at] = result[0];
  }
  __device__ void write_root(int64_t at, const acc_t* result) const {
    h[at] = result[0];
  }
};

// Where a backward scan goes; stream 0 is x, stream 1 the gradient of h, propagated the other way.
template <Propagation kForward, typename acc_t>
struct BackwardOutput {
  acc_t *grad_x, *grad_decay;

  __device__ acc_t* partial(int stream) const {
    return stream == 0 ? grad_decay : grad_x;
  }
  __device__ void write(
      int64_t at, acc_t decay, const acc_t* sum, const acc_t* above_result, const acc_t* result) const {
    grad_x[at] = result[1];
    if constexpr (kForward == Propagation::kAll) {
      grad_decay[at] = sum[1] * (above_result[0] - decay * sum[0]) + sum[0] * (above_result[1] - decay * sum[1]);
    } else if constexpr (kForward == Propagation::kUp) {
      grad_decay[at] = sum[0] * above_result[1];
    } else {
      grad_decay[at] = sum[1] * above_result[0];
    }
  }
  __device__ void write_root(int64_t at, const acc_t* result) const {
    grad_x[at] = result[1];
    grad_decay[at] = 0;
  }
};

// Forward scan of `input`, whose one stream are the values, to h (B, L, D).
template <typename acc_t, typename Input>
void scan_forward(const Input& input, Propagation propagation, const Pieces& pieces, at::Tensor& h) {
  const ForwardOutput<acc_t> output{h.mutable_data_ptr<acc_t>()};
  const auto scan = [&](auto streams) {
    scan_pieces<decltype(streams), acc_t>(input, output, pieces, h.size(0), h.options(), h.size(2));
  };
  switch (propagation) {
    case Propagation::kAll:
      return scan(Streams<Propagation::kAll>());
    case Propagation::kUp:
      return scan(Streams<Propagation::kUp>());
    case Propagation::kDown:
      return scan(Streams<Propagation::kDown>());
  }
}

// Backward scan of `input`, whose streams are the values and the gradient of h, to two tensors (B, L, D).
template <typename acc_t, typename Input>
void scan_backward(
    const Input& input,
    Propagation propagation,
    const Pieces& pieces,
    at::Tensor& grad_values,
    at::Tensor& grad_decay) {
  const auto scan = [&](auto streams) {
    using S = decltype(streams);
    const BackwardOutput<S::of(0), acc_t> output{
        grad_values.mutable_data_ptr<acc_t>(), grad_decay.mutable_data_ptr<acc_t>()};
    scan_pieces<S, acc_t>(input, output, pieces, grad_values.size(0), grad_values.options(), grad_values.size(2));
  };
  switch (propagation) {
    case Propagation::kAll:
      return scan(Streams<Propagation::kAll, Propagation::kAll>());
    case Propagation::kUp:
      return scan(Streams<Propagation::kUp, Propagation::kDown>());
    case Propagation::kDown:
      return scan(Streams<Propagation::kDown, Propagation::kUp>());
  }
}

}  // namespace grootvl::cuda
