// Scans along trees cut into pieces, in three kernels:
//   summarise  each piece from its members to its top, without what comes from below its bottom
//   join       the tree of critical vertices, up and down, from these summaries
//   finish     each piece again, now knowing its bottom's sum and its top's result
//
// In summarise and finish a block has a tile of pieces (tiles.cuh).
//
// One or two streams of values run over the same decays: x alone forwards, x and the gradient of h backwards. In a
// piece with bottom b and top t let P be the product of the decays on the path from b to t ("through"), s what the
// members add to the top while b's sum is taken as 0, and T what they add to b's result ("along"). Then
//   u_t += s + P u_b                    up the tree of critical vertices
//   h_b  = T + u_b + P (h_t - P u_b)    down that tree (all);  h_b = T + P h_t (down)
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "cuda/join_pieces.cuh"
#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/pieces.cuh"
#include "cuda/tiles.cuh"
#include "scan.h"

namespace grootvl::cuda {

// `partials` has a row for each piece of each image, for what it adds to its top.
template <typename S, typename acc_t, int kPack, typename Input>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<S::kCount>) summarise_kernel(
    Input input,
    Partials<acc_t, S::kCount> partials,
    Pieces batch,
    int64_t channels,
    Tiling tiling,
    Summaries<acc_t> summaries) {
  using Values = Pack<acc_t, kPack>;
  const LanePlace<kPack> place(channels);
  const TreePieces tree = batch[place.image];
  const int64_t first_row = place.image * batch.vertices, first_critical = place.image * batch.most_criticals;
  const Cells<acc_t, kPack, S::kCount> cells(tiling.capacity, place.lane);
  const typename Input::Lane of_lane = input.lane(place.channel);
  const auto write = [&](acc_t* of, int stream, int64_t row, const Values& values) {
    if (place.is_active) {
      store_pack(&summaries.at(of, stream, row, channels, place.channel), values);
    }
  };
  for (int index = blockIdx.y; index < tiling.tiles; index += gridDim.y) {
    const Tile tile = find_tile(tree, tiling, index);
    load_tile(input, of_lane, place, tree, tile, first_row, cells);
    if (index == 0 && place.group == kTileGroups - 1) {
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        write(summaries.value, s, first_critical, cells(s, tile.members));
      }
    }
    for (int piece = tile.first_piece + place.group; piece < tile.end_piece; piece += kTileGroups) {
      const int slot = tree.first[piece], begin = slot - tile.first_slot, members = tree.first[piece + 1] - slot;
      const int bottom_place = tree.bottom_place[piece], bottom = tree.bottom[piece];
      Values through = make_pack<acc_t, kPack>([](int) { return 1; });
      Values along[S::kCount] = {}, partial[S::kCount] = {};
      if (bottom_place >= 0) {
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          write(summaries.value, s, first_critical + bottom, cells(s, begin + bottom_place));
          if (S::up(s)) {
            cells(s, begin + bottom_place) = {};
          }
        }
      }
      int on_path = bottom_place;
      const auto visit = [&](int i, int above, const Values& decay) {
        Values value[S::kCount];
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          value[s] = cells(s, begin + i);
        }
        if (i == on_path) {
#pragma unroll
          for (int p = 0; p < kPack; ++p) {
#pragma unroll
            for (int s = 0; s < S::kCount; ++s) {
              if (S::down(s)) {
                along[s][p] += through[p] * (S::up(s) ? (1 - decay[p]) * (1 + decay[p]) : 1) * value[s][p];
              }
            }
            through[p] *= decay[p];
          }
          on_path = above;
        }
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          if (S::up(s)) {
            if (above >= 0) {
              Values& sum = cells(s, begin + above);
              sum = make_pack<acc_t, kPack>([&](int p) { return sum[p] + decay[p] * value[s][p]; });
            } else {
              partial[s] = make_pack<acc_t, kPack>([&](int p) { return decay[p] * value[s][p]; });
            }
          }
        }
      };
      for_each_member<false>(input, of_lane, cells, begin, members, visit);
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        if (S::up(s) && place.is_active) {
          store_pack(partials.rows[s] + (first_row + piece) * channels + place.channel, partial[s]);
        }
      }
      if (bottom_place >= 0) {
        write(summaries.through, 0, first_critical + bottom, through);
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          if (S::down(s)) {
            write(summaries.along, s, first_critical + bottom, along[s]);
          }
        }
      }
    }
  }
}

// `Output` takes what is known of a row: write(at, row, decay, sums, results of the parent, results), and of the root
// write_root(at, results), `at` being the place of this lane's channels.
template <typename S, typename acc_t, int kPack, typename Input, typename Output>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<S::kCount>) finish_kernel(
    Input input, Output output, Pieces batch, int64_t channels, Tiling tiling, Summaries<acc_t> summaries) {
  using Values = Pack<acc_t, kPack>;
  constexpr bool kAnyUp = S::up(0) || S::up(S::kCount - 1);
  const LanePlace<kPack> place(channels);
  const TreePieces tree = batch[place.image];
  const int64_t first_row = place.image * batch.vertices, first_critical = place.image * batch.most_criticals;
  const Cells<acc_t, kPack, S::kCount> cells(tiling.capacity, place.lane);
  const typename Input::Lane of_lane = input.lane(place.channel);
  const auto read = [&](acc_t* of, int stream, int64_t row) {
    return load_pack<kPack>(&summaries.at(of, stream, row, channels, place.channel));
  };
  for (int index = blockIdx.y; index < tiling.tiles; index += gridDim.y) {
    const Tile tile = find_tile(tree, tiling, index);
    load_tile(input, of_lane, place, tree, tile, first_row, cells);
    if (index == 0 && place.group == kTileGroups - 1 && place.is_active) {
      Values at_root[S::kCount];
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        at_root[s] = read(summaries.result, s, first_critical);
      }
      output.write_root((first_row + cells.vertex[tile.members]) * channels + place.channel, at_root);
    }
    for (int piece = tile.first_piece + place.group; piece < tile.end_piece; piece += kTileGroups) {
      const int slot = tree.first[piece], begin = slot - tile.first_slot, members = tree.first[piece + 1] - slot;
      const int bottom_place = tree.bottom_place[piece];
      Values at_top[S::kCount] = {};
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        if (S::up(s) && bottom_place >= 0) {
          cells(s, begin + bottom_place) = read(summaries.sum, s, first_critical + tree.bottom[piece]);
        }
        if (S::down(s)) {
          at_top[s] = read(summaries.result, s, first_critical + tree.top[piece]);
        }
      }
      if (kAnyUp) {
        for_each_member<false>(input, of_lane, cells, begin, members, [&](int i, int above, const Values& decay) {
#pragma unroll
          for (int s = 0; s < S::kCount; ++s) {
            if (S::up(s) && above >= 0) {
              const Values value = cells(s, begin + i);
              Values& sum = cells(s, begin + above);
              sum = make_pack<acc_t, kPack>([&](int p) { return sum[p] + decay[p] * value[p]; });
            }
          }
        });
      }
      for_each_member<true>(input, of_lane, cells, begin, members, [&](int i, int above, const Values& decay) {
        Values sum[S::kCount], above_result[S::kCount], result[S::kCount];
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          sum[s] = cells(s, begin + i);
          above_result[s] = above >= 0 ? cells(s, begin + above) : at_top[s];
          result[s] = make_pack<acc_t, kPack>([&](int p) {
            if (S::up(s) && S::down(s)) {
              return sum[s][p] + decay[p] * (above_result[s][p] - decay[p] * sum[s][p]);
            }
            return S::down(s) ? sum[s][p] + decay[p] * above_result[s][p] : sum[s][p];
          });
          cells(s, begin + i) = result[s];
        }
        if (place.is_active) {
          const int64_t row = first_row + cells.vertex[begin + i];
          output.write(row * channels + place.channel, decay, sum, above_result, result);
        }
      });
    }
  }
}

// Runs the three kernels. `input` and `output` are for rows (B * L, channels); at least one row and one channel.
// `partials` are B * L rows a stream that are free until `output` is written.
template <typename S, typename acc_t, int kPack, typename Input, typename Output>
void scan_pieces(
    const Input& input,
    const Output& output,
    const Partials<acc_t, S::kCount>& partials,
    const Pieces& pieces,
    int64_t batch,
    int64_t channels,
    const at::TensorOptions& options) {
  static_assert(Input::kStreams == S::kCount);
  const int64_t rows = batch * pieces.most_criticals;
  const at::Tensor memory = at::empty({4 * S::kCount + 1, rows, channels}, options);
  const Summaries<acc_t> summaries(memory.mutable_data_ptr<acc_t>(), S::kCount, rows, channels);

  constexpr int64_t kRowBytes = Cells<acc_t, kPack, S::kCount>::kRowBytes;
  const Tiling tiling = choose_tiling(pieces, kRowBytes, kTileBlocks<S::kCount>);
  const int64_t bytes = tiling.capacity * kRowBytes;
  TORCH_CHECK(
      bytes <= shared_memory_limit(),
      "a piece of a tree takes ",
      bytes,
      " bytes, more than the device's shared memory");
  const int64_t blocks = batch * divide_up<int64_t>(channels, kRowLanes * kPack);
  TORCH_CHECK_VALUE(
      blocks < int64_t{1} << 31,
      "the batch times the channels is too large for one launch, got ",
      batch,
      " images of ",
      channels,
      " channels");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(tiling.tiles, 65535)));
  launch(
      summarise_kernel<S, acc_t, kPack, Input>,
      grid,
      kTileThreads,
      bytes,
      input,
      partials,
      pieces,
      channels,
      tiling,
      summaries);
  join_pieces<S>(partials, pieces, batch, channels, summaries);
  launch(
      finish_kernel<S, acc_t, kPack, Input, Output>,
      grid,
      kTileThreads,
      bytes,
      input,
      output,
      pieces,
      channels,
      tiling,
      summaries);
}

// Rows for what pieces add to their tops: those of a result, where it has the type, else new ones.
template <typename acc_t>
acc_t* partial_rows(const at::Tensor& result, at::Tensor& memory) {
  memory = result.scalar_type() == c10::CppTypeToScalarType<acc_t>::value
               ? result
               : at::empty(result.sizes(), result.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  return memory.mutable_data_ptr<acc_t>();
}

// Where a forward scan goes.
template <typename T>
struct ForwardOutput {
  T* h;

  template <typename Values>
  __device__ void write(int64_t at, const Values&, const Values*, const Values*, const Values* result) const {
    store_pack(h + at, result[0]);
  }
  template <typename Values>
  __device__ void write_root(int64_t at, const Values* result) const {
    store_pack(h + at, result[0]);
  }
};

// Where a backward scan goes; stream 0 is x, stream 1 the gradient of h, propagated the other way.
template <Propagation kForward, typename T>
struct BackwardOutput {
  T *grad_x, *grad_decay;

  template <typename acc_t, int kPack>
  __device__ void write(
      int64_t at,
      const Pack<acc_t, kPack>& decay,
      const Pack<acc_t, kPack>* sum,
      const Pack<acc_t, kPack>* above_result,
      const Pack<acc_t, kPack>* result) const {
    store_pack(grad_x + at, result[1]);
    store_pack(grad_decay + at, make_pack<acc_t, kPack>([&](int p) {
                 if constexpr (kForward == Propagation::kAll) {
                   return sum[1][p] * (above_result[0][p] - decay[p] * sum[0][p]) +
                          sum[0][p] * (above_result[1][p] - decay[p] * sum[1][p]);
                 } else if constexpr (kForward == Propagation::kUp) {
                   return sum[0][p] * above_result[1][p];
                 } else {
                   return sum[1][p] * above_result[0][p];
                 }
               }));
  }
  template <typename acc_t, int kPack>
  __device__ void write_root(int64_t at, const Pack<acc_t, kPack>* result) const {
    store_pack(grad_x + at, result[1]);
    store_pack(grad_decay + at, Pack<acc_t, kPack>{});
  }
};

// Forward scan of `input`, whose one stream are the values, to h (B, L, D), contiguous, of type T.
template <typename T, typename acc_t, int kPack, typename Input>
void scan_forward(const Input& input, Propagation propagation, const Pieces& pieces, at::Tensor& h) {
  at::Tensor memory;
  const Partials<acc_t, 1> partials{{partial_rows<acc_t>(h, memory)}};
  const ForwardOutput<T> output{h.mutable_data_ptr<T>()};
  const auto scan = [&](auto streams) {
    scan_pieces<decltype(streams), acc_t, kPack>(
        input, output, partials, pieces, h.size(0), h.size(2), memory.options());
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

// Backward scan of `input`, whose streams are the values and the gradient of h, to two tensors (B, L, D), contiguous,
// of type T.
template <typename T, typename acc_t, int kPack, typename Input>
void scan_backward(
    const Input& input,
    Propagation propagation,
    const Pieces& pieces,
    at::Tensor& grad_values,
    at::Tensor& grad_decay) {
  at::Tensor memory[2];
  const Partials<acc_t, 2> partials{
      {partial_rows<acc_t>(grad_decay, memory[0]), partial_rows<acc_t>(grad_values, memory[1])}};
  const auto scan = [&](auto streams) {
    using S = decltype(streams);
    const BackwardOutput<S::of(0), T> output{grad_values.mutable_data_ptr<T>(), grad_decay.mutable_data_ptr<T>()};
    scan_pieces<S, acc_t, kPack>(
        input, output, partials, pieces, grad_values.size(0), grad_values.size(2), memory[0].options());
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
