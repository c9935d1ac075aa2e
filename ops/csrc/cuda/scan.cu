// CUDA kernels of the tree scan; see piece_scan.cuh.
#include "scan.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/piece_scan.cuh"

namespace grootvl::cuda {

namespace {

// Rows of values and decays as they are given.
template <typename scalar_t>
struct GivenInput {
  const scalar_t* decays;
  const scalar_t* values[2];
  int64_t channels;

  __device__ scalar_t decay(int64_t row, int64_t channel) const {
    return decays[row * channels + channel];
  }
  __device__ scalar_t value(int stream, int64_t row, int64_t channel) const {
    return values[stream][row * channels + channel];
  }
};

struct Cuda {
  using Scope = c10::cuda::CUDAGuard;

  static void forward(
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      Propagation propagation,
      at::Tensor& h) {
    const PieceTensors cut = cut_trees(parent.contiguous(), order.contiguous());
    const at::Tensor x_rows = x.contiguous(), decay_rows = decay.contiguous();
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tree_scan", [&] {
      const GivenInput<scalar_t> input{
          decay_rows.const_data_ptr<scalar_t>(), {x_rows.const_data_ptr<scalar_t>(), nullptr}, x.size(2)};
      scan_forward<scalar_t>(input, propagation, cut.pieces, h);
    });
  }

  static void backward(
      const at::Tensor& grad_h,
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      Propagation propagation,
      at::Tensor& grad_x,
      at::Tensor& grad_decay) {
    const PieceTensors cut = cut_trees(parent.contiguous(), order.contiguous());
    const at::Tensor grad_rows = grad_h.contiguous(), x_rows = x.contiguous(), decay_rows = decay.contiguous();
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tree_scan_backward", [&] {
      const GivenInput<scalar_t> input{
          decay_rows.const_data_ptr<scalar_t>(),
          {x_rows.const_data_ptr<scalar_t>(), grad_rows.const_data_ptr<scalar_t>()},
          x.size(2)};
      scan_backward<scalar_t>(input, propagation, cut.pieces, grad_x, grad_decay);
    });
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("tree_scan", &ScanOperators<Cuda>::forward);
  m.impl("tree_scan_backward", &ScanOperators<Cuda>::backward);
}

}  // namespace grootvl::cuda
