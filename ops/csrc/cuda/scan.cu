// CUDA kernels of the tree scan; see piece_scan.cuh.
#include "scan.h"

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <type_traits>

#include "cuda/piece_scan.cuh"

namespace grootvl::cuda {

namespace {

// Rows of values and decays as they are given: x, and backwards the gradient of h as well.
template <typename T, typename acc_t, int kPack, int kOfStreams>
struct GivenInput {
  static constexpr int kStreams = kOfStreams;
  Rows<const T> decays;
  Rows<const T> values[kStreams];

  template <typename Cells>
  __device__ void copy(int64_t row, int64_t channel, const Cells& cells, int to) const {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      cells.copy(values[s][row] + channel, s, to);
    }
    cells.copy(decays[row] + channel, kStreams, to);
  }
  template <typename Cells>
  __device__ void prepare(const LanePlace<kPack>& place, int64_t, int rows, const Cells& cells) const {
    __pipeline_wait_prior(0);
    if constexpr (!std::is_same_v<T, acc_t>) {
      for (int row = place.group; row < rows; row += kTileGroups) {
#pragma unroll
        for (int s = 0; s <= kStreams; ++s) {
          cells(s, row) = convert<acc_t>(cells.template as<T>(s, row));
        }
      }
    }
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
