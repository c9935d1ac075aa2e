// Scans along trees cut into pieces, in three kernels:
//   summarise  each piece, from its members to its top, without the contributions from below its bottom
//   join       the tree of critical vertices, up and down, from these summaries
//   finish     each piece again, with its bottom's sum and its top's result
//
// In summarise and finish, each block processes tiles of pieces (tiles.cuh).
//
// One or two streams of values share the same decays: x in the forward pass, x and the gradient of h in the backward
// pass. For a piece with bottom b and top t, let P be the product of the decays on the path from b to t ("through"), s
// the members' contribution to the top if b's sum were 0, and T their contribution to b's result ("along"). Then
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

// `partials` has a row for each piece of each image: its contribution to its top.
template <typename S, typename acc_t, int kPack, typename Input>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t, S::kCount>) summarise_kernel(
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
  const auto write = [&](acc_t* of, int stream, int64_t row, const Values& values) {
    if (place.is_active) {
      store_pack(&summaries.at(of, stream, row, channels, place.channel), values);
    }
  };
  for (int index = blockIdx.y; index < tiling.tiles; index += gridDim.y) {
    const Tile tile = find_tile(tree, tiling, index);
    PieceRows next = PieceRows::load(tree, tile, tile.first_piece + place.group);
    load_tile(input, place, tree, tile, first_row, cells);
    if (index == 0 && place.group == kTileGroups - 1) {
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        write(summaries.value, s, first_critical, cells(s, tile.members));
      }
    }
    for (int piece = tile.first_piece + place.group; piece < tile.end_piece; piece += kTileGroups) {
      const PieceRows own = next;
      const int begin = own.begin;
      next = PieceRows::load(tree, tile, piece + kTileGroups);
      Values through = make_pack<acc_t, kPack>([](int) { return 1; });
      Values along[S::kCount] = {}, value[S::kCount];
      if (own.bottom_place >= 0) {
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          write(summaries.value, s, first_critical + own.bottom, cells(s, begin + own.bottom_place));
          if (S::up(s)) {
            cells(s, begin + own.bottom_place) = {};
          }
        }
      }
      int on_path = own.bottom_place;
      // Reads the values of member i, and adds them to those along the path if it is there. Without a branch: the
      // groups of a warp would wait for each other in it.
      const auto pass = [&](int i, int above, const Values& decay) {
        const bool is_on_path = i == on_path;
        on_path = is_on_path ? above : on_path;
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          value[s] = cells(s, begin + i);
        }
#pragma unroll
        for (int p = 0; p < kPack; ++p) {
#pragma unroll
          for (int s = 0; s < S::kCount; ++s) {
            if (S::down(s)) {
              const acc_t factor = through[p] * (S::up(s) ? (1 - decay[p]) * (1 + decay[p]) : 1);
              along[s][p] = is_on_path ? along[s][p] + factor * value[s][p] : along[s][p];
            }
          }
          through[p] = is_on_path ? through[p] * decay[p] : through[p];
        }
      };
      for_each_member<false>(cells, begin, own.members, [&](int i, int above, const Values& decay) {
        pass(i, above, decay);
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          if (S::up(s)) {
            Values& sum = cells(s, begin + above);
            sum = make_pack<acc_t, kPack>([&](int p) { return sum[p] + decay[p] * value[s][p]; });
          }
        }
      });
      const Values decay = cells.kept(begin);
      pass(0, -1, decay);
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        if (S::up(s) && place.is_active) {
          const Values partial = make_pack<acc_t, kPack>([&](int p) { return decay[p] * value[s][p]; });
          store_pack(partials.rows[s] + (first_row + piece) * channels + place.channel, partial);
        }
      }
      if (own.bottom_place >= 0) {
        write(summaries.through, 0, first_critical + own.bottom, through);
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          if (S::down(s)) {
            write(summaries.along, s, first_critical + own.bottom, along[s]);
          }
        }
      }
    }
  }
}

// The sum u and the result h of each stream at the critical vertices of a batch, after the scan of their tree; a row of
// channels for each vertex.
template <typename acc_t, int kStreams>
struct Ends {
  const acc_t *sum[kStreams], *result[kStreams];
};

// `Output` receives each row: write(at, decay, sums, results of the parent, results), and for the root
// write_root(at, results), where `at` is the index of this lane's first channel. With kByRows, it receives whole tiles
// instead: take_rows(place, first_row, rows, cells, tile), when the cells contain the results, and `kept` the gradients
// of the decays.
template <typename S, typename acc_t, int kPack, typename Input, typename Output>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t, S::kCount>) finish_kernel(
    Input input, Output output, Pieces batch, int64_t channels, Tiling tiling, Ends<acc_t, S::kCount> ends) {
  using Values = Pack<acc_t, kPack>;
  constexpr bool kAnyUp = S::up(0) || S::up(S::kCount - 1);
  const LanePlace<kPack> place(channels);
  const TreePieces tree = batch[place.image];
  const int64_t first_row = place.image * batch.vertices, first_critical = place.image * batch.most_criticals;
  const int64_t first_value = first_row * channels + place.channel;
  const Cells<acc_t, kPack, S::kCount> cells(tiling.capacity, place.lane);
  const auto read = [&](const acc_t* of, int64_t row) {
    return load_pack<kPack>(of + (first_critical + row) * channels + place.channel);
  };
  for (int index = blockIdx.y; index < tiling.tiles; index += gridDim.y) {
    const Tile tile = find_tile(tree, tiling, index);
    PieceRows next = PieceRows::load(tree, tile, tile.first_piece + place.group);
    load_tile(input, place, tree, tile, first_row, cells);
    if (index == 0 && place.group == kTileGroups - 1) {
      Values at_root[S::kCount];
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        at_root[s] = read(ends.result[s], 0);
        cells(s, tile.members) = at_root[s];
      }
      if constexpr (Output::kByRows) {
        cells.kept(tile.members) = {};
      } else if (place.is_active) {
        output.write_root(first_value + cells.vertex[tile.members] * channels, at_root);
      }
    }
    for (int piece = tile.first_piece + place.group; piece < tile.end_piece; piece += kTileGroups) {
      const PieceRows own = next;
      const int begin = own.begin;
      next = PieceRows::load(tree, tile, piece + kTileGroups);
      Values at_top[S::kCount] = {};
#pragma unroll
      for (int s = 0; s < S::kCount; ++s) {
        if (S::up(s) && own.bottom_place >= 0) {
          cells(s, begin + own.bottom_place) = read(ends.sum[s], own.bottom);
        }
        if (S::down(s)) {
          at_top[s] = read(ends.result[s], own.top);
        }
      }
      if (kAnyUp) {
        for_each_member<false>(cells, begin, own.members, [&](int i, int above, const Values& decay) {
#pragma unroll
          for (int s = 0; s < S::kCount; ++s) {
            if (S::up(s)) {
              const Values value = cells(s, begin + i);
              Values& sum = cells(s, begin + above);
              sum = make_pack<acc_t, kPack>([&](int p) { return sum[p] + decay[p] * value[p]; });
            }
          }
        });
      }
      const auto settle = [&](int i, const Values& decay, const Values(&above_result)[S::kCount]) {
        Values sum[S::kCount], result[S::kCount];
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          sum[s] = cells(s, begin + i);
          result[s] = make_pack<acc_t, kPack>([&](int p) {
            if (S::up(s) && S::down(s)) {
              return sum[s][p] + decay[p] * (above_result[s][p] - decay[p] * sum[s][p]);
            }
            return S::down(s) ? sum[s][p] + decay[p] * above_result[s][p] : sum[s][p];
          });
          cells(s, begin + i) = result[s];
        }
        if constexpr (Output::kByRows) {
          cells.kept(begin + i) = output.of_decay(decay, sum, above_result);
        } else if (place.is_active) {
          // The product of 32-bit factors is one instruction.
          const int64_t at = first_value + int64_t{cells.vertex[begin + i]} * static_cast<int>(channels);
          output.write(at, decay, sum, above_result, result);
        }
      };
      settle(0, cells.kept(begin), at_top);
      for_each_member<true>(cells, begin, own.members, [&](int i, int above, const Values& decay) {
        Values above_result[S::kCount];
#pragma unroll
        for (int s = 0; s < S::kCount; ++s) {
          above_result[s] = cells(s, begin + above);
        }
        settle(i, decay, above_result);
      });
    }
    if constexpr (Output::kByRows) {
      __syncthreads();
      output.take_rows(place, first_row, tile.rows, cells, place.image * tiling.tiles + index);
    }
  }
}

// Tiles of `kStreams` streams.
template <typename acc_t, int kPack, int kStreams>
Tiling tiling_of(const Pieces& pieces) {
  return choose_tiling(pieces, Cells<acc_t, kPack, kStreams>::kRowBytes, kTileBlocks<acc_t, kStreams>);
}

// Launches a kernel over the tiles of all images and channels.
template <typename acc_t, int kPack, int kStreams, typename Kernel, typename... Arguments>
void launch_tiles(Kernel kernel, const Tiling& tiling, int64_t batch, int64_t channels, const Arguments&... arguments) {
  const int64_t bytes = tiling.capacity * Cells<acc_t, kPack, kStreams>::kRowBytes;
  TORCH_CHECK(
      bytes <= shared_memory_limit(),
      "a piece of a tree takes ",
      bytes,
      " bytes, more than the device's shared memory");
  const int64_t blocks = batch * divide_up<int64_t>(channels, kRowLanes * kPack);
  TORCH_CHECK_VALUE(
      std::max(blocks, channels) < int64_t{1} << 31,
      "the batch times the channels is too large for one launch, got ",
      batch,
      " images of ",
      channels,
      " channels");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(tiling.tiles, 65535)));
  launch(kernel, grid, kTileThreads, bytes, arguments...);
}

// Results of the scan over critical vertices, and the memory that contains them.
template <typename acc_t, int kStreams>
struct Joined {
  at::Tensor memory;
  Ends<acc_t, kStreams> ends;
};

// Runs summarise and join. `input` has rows (B * L, channels), with at least one row and one channel. `partials` is
// scratch memory of B * L rows per stream, unused after these kernels.
template <typename S, typename acc_t, int kPack, typename Input>
Joined<acc_t, S::kCount> scan_criticals(
    const Input& input,
    const Partials<acc_t, S::kCount>& partials,
    const Pieces& pieces,
    int64_t batch,
    int64_t channels,
    const at::TensorOptions& options) {
  static_assert(Input::kStreams == S::kCount);
  const int64_t rows = batch * pieces.most_criticals;
  const at::Tensor memory = at::empty({4 * S::kCount + 1, rows, channels}, options);
  const Summaries<acc_t> summaries(memory.mutable_data_ptr<acc_t>(), S::kCount, rows, channels);
  const Tiling tiling = tiling_of<acc_t, kPack, S::kCount>(pieces);
  launch_tiles<acc_t, kPack, S::kCount>(
      summarise_kernel<S, acc_t, kPack, Input>,
      tiling,
      batch,
      channels,
      input,
      partials,
      pieces,
      channels,
      tiling,
      summaries);
  join_pieces<S>(partials, pieces, batch, channels, summaries);
  Joined<acc_t, S::kCount> joined{memory, {}};
  for (int s = 0; s < S::kCount; ++s) {
    joined.ends.sum[s] = summaries.sum + s * rows * channels;
    joined.ends.result[s] = summaries.result + s * rows * channels;
  }
  return joined;
}

// Runs finish, which may overwrite the partials.
template <typename S, typename acc_t, int kPack, typename Input, typename Output>
void finish_pieces(
    const Input& input,
    const Output& output,
    const Ends<acc_t, S::kCount>& ends,
    const Pieces& pieces,
    int64_t batch,
    int64_t channels) {
  static_assert(Input::kStreams == S::kCount);
  const Tiling tiling = tiling_of<acc_t, kPack, S::kCount>(pieces);
  launch_tiles<acc_t, kPack, S::kCount>(
      finish_kernel<S, acc_t, kPack, Input, Output>,
      tiling,
      batch,
      channels,
      input,
      output,
      pieces,
      channels,
      tiling,
      ends);
}

// Rows for the contributions of pieces to their tops: those of a result if it has this type, otherwise new memory.
template <typename acc_t>
acc_t* partial_rows(const at::Tensor& result, at::Tensor& memory) {
  memory = result.scalar_type() == c10::CppTypeToScalarType<acc_t>::value
               ? result
               : at::empty(result.sizes(), result.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  return memory.mutable_data_ptr<acc_t>();
}

// The output of a forward scan.
template <typename T>
struct ForwardOutput {
  static constexpr bool kByRows = false;

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

// The gradient of a scan's decay. Stream 0 has the values, stream 1 the gradient of h, propagated in the reverse way.
template <Propagation kForward, typename acc_t, int kPack>
__device__ Pack<acc_t, kPack> gradient_of_decay(
    const Pack<acc_t, kPack>& decay, const Pack<acc_t, kPack>* sum, const Pack<acc_t, kPack>* above_result) {
  return make_pack<acc_t, kPack>([&](int p) {
    if constexpr (kForward == Propagation::kAll) {
      return sum[1][p] * (above_result[0][p] - decay[p] * sum[0][p]) +
             sum[0][p] * (above_result[1][p] - decay[p] * sum[1][p]);
    } else if constexpr (kForward == Propagation::kUp) {
      return sum[0][p] * above_result[1][p];
    } else {
      return sum[1][p] * above_result[0][p];
    }
  });
}

// The output of a backward scan, with streams as above.
template <Propagation kForward, typename T>
struct BackwardOutput {
  static constexpr bool kByRows = false;

  T *grad_x, *grad_decay;

  template <typename acc_t, int kPack>
  __device__ void write(
      int64_t at,
      const Pack<acc_t, kPack>& decay,
      const Pack<acc_t, kPack>* sum,
      const Pack<acc_t, kPack>* above_result,
      const Pack<acc_t, kPack>* result) const {
    store_pack(grad_x + at, result[1]);
    store_pack(grad_decay + at, gradient_of_decay<kForward>(decay, sum, above_result));
  }
  template <typename acc_t, int kPack>
  __device__ void write_root(int64_t at, const Pack<acc_t, kPack>* result) const {
    store_pack(grad_x + at, result[1]);
    store_pack(grad_decay + at, Pack<acc_t, kPack>{});
  }
};

// The streams of scans: the values, their gradients, which are propagated in the reverse direction, and both.
template <Propagation kForward, Propagation kBackward>
struct Directions {
  using Forward = Streams<kForward>;
  using Backward = Streams<kBackward>;
  using Both = Streams<kForward, kBackward>;
};

// Calls run(Directions) for a propagation of the values.
template <typename Run>
void with_directions(Propagation propagation, const Run& run) {
  switch (propagation) {
    case Propagation::kAll:
      return run(Directions<Propagation::kAll, Propagation::kAll>());
    case Propagation::kUp:
      return run(Directions<Propagation::kUp, Propagation::kDown>());
    case Propagation::kDown:
      return run(Directions<Propagation::kDown, Propagation::kUp>());
  }
}

// Forward scan of `input`, whose single stream has the values, to h (B, L, D), contiguous, of type T. Returns the
// results that a backward scan can reuse.
template <typename T, typename acc_t, int kPack, typename Input>
Joined<acc_t, 1> scan_forward(const Input& input, Propagation propagation, const Pieces& pieces, at::Tensor& h) {
  const int64_t batch = h.size(0), channels = h.size(2);
  at::Tensor memory;
  const Partials<acc_t, 1> partials{{partial_rows<acc_t>(h, memory)}};
  Joined<acc_t, 1> joined;
  with_directions(propagation, [&](auto directions) {
    using S = typename decltype(directions)::Forward;
    joined = scan_criticals<S, acc_t, kPack>(input, partials, pieces, batch, channels, memory.options());
    finish_pieces<S, acc_t, kPack>(
        input, ForwardOutput<T>{h.mutable_data_ptr<T>()}, joined.ends, pieces, batch, channels);
  });
  return joined;
}

// Backward scan of `input`, whose streams have the values and the gradient of h, to two tensors (B, L, D), contiguous,
// of type T.
template <typename T, typename acc_t, int kPack, typename Input>
void scan_backward(
    const Input& input,
    Propagation propagation,
    const Pieces& pieces,
    at::Tensor& grad_values,
    at::Tensor& grad_decay) {
  const int64_t batch = grad_values.size(0), channels = grad_values.size(2);
  at::Tensor memory[2];
  const Partials<acc_t, 2> partials{
      {partial_rows<acc_t>(grad_decay, memory[0]), partial_rows<acc_t>(grad_values, memory[1])}};
  with_directions(propagation, [&](auto directions) {
    using S = typename decltype(directions)::Both;
    const BackwardOutput<S::of(0), T> output{grad_values.mutable_data_ptr<T>(), grad_decay.mutable_data_ptr<T>()};
    const auto joined = scan_criticals<S, acc_t, kPack>(input, partials, pieces, batch, channels, memory[0].options());
    finish_pieces<S, acc_t, kPack>(input, output, joined.ends, pieces, batch, channels);
  });
}

}  // namespace grootvl::cuda
