// CUDA kernels of the tree scan; see piece_scan.cuh.
#include "scan.h"

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/piece_scan.cuh"

namespace grootvl::cuda {

namespace {

// Rows of values and decays as they are given: x, and backwards the gradient of h as well.
template <typename T, typename acc_t, int kPack, int kOfStreams>
struct GivenInput {
  static constexpr int kStreams = kOfStreams;
  using Values = Pack<acc_t, kPack>;

  Rows<const T> decays;
  Rows<const T> values[kStreams];

  struct Lane {};
  struct Raw {
    Pack<T, kPack> decay, values[kStreams];
  };

  __device__ Lane lane(int64_t) const {
    return {};
  }
  __device__ Raw load(int64_t row, int64_t channel, int) const {
    Raw raw;
    raw.decay = load_pack<kPack>(decays[row] + channel);
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      raw.values[s] = load_pack<kPack>(values[s][row] + channel);
    }
    return raw;
  }
  template <int kCount, typename RowOf, typename Take>
  __device__ void use(const Raw (&raws)[kCount], const RowOf&, const Lane&, int64_t, const Take& take) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      Values of_streams[kStreams];
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        of_streams[s] = convert<acc_t>(raws[j].values[s]);
      }
      take(j, of_streams, convert<acc_t>(raws[j].decay));
    }
  }
  __device__ const Values& decay(const Values& kept, const Lane&) const {
    return kept;
  }
};

struct Cuda {
  using Scope = c10::cuda::CUDAGuard;

  static bool computes(const at::Tensor& x) {
    return computes_rows(x);
  }

  static void forward(
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      const OptionalTensor& cut,
      Propagation propagation,
      at::Tensor& h) {
    const PieceTensors trees = cut_trees(parent, order, cut);
    for_rows(x, [&](auto stored, auto pack) {
      using T = decltype(stored);
      constexpr int kPack = decltype(pack)::value;
      const at::Tensor x_rows = readable_rows(x, kPack), decay_rows = readable_rows(decay, kPack);
      const GivenInput<T, Computed<T>, kPack, 1> input{rows_of<T>(decay_rows), {rows_of<T>(x_rows)}};
      scan_forward<T, Computed<T>, kPack>(input, propagation, trees.pieces, h);
    });
  }

  static void backward(
      const at::Tensor& grad_h,
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      const OptionalTensor& cut,
      Propagation propagation,
      at::Tensor& grad_x,
      at::Tensor& grad_decay) {
    const PieceTensors trees = cut_trees(parent, order, cut);
    for_rows(x, [&](auto stored, auto pack) {
      using T = decltype(stored);
      constexpr int kPack = decltype(pack)::value;
      const at::Tensor grad_rows = readable_rows(grad_h, kPack), x_rows = readable_rows(x, kPack),
                       decay_rows = readable_rows(decay, kPack);
      const GivenInput<T, Computed<T>, kPack, 2> input{
          rows_of<T>(decay_rows), {rows_of<T>(x_rows), rows_of<T>(grad_rows)}};
      scan_backward<T, Computed<T>, kPack>(input, propagation, trees.pieces, grad_x, grad_decay);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("tree_scan", &ScanOperators<Cuda>::forward);
  m.impl("tree_scan_backward", &ScanOperators<Cuda>::backward);
}

}  // namespace grootvl::cuda
