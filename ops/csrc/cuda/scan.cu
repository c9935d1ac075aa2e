// CUDA kernels of the tree scan; see piece_scan.cuh.
#include "scan.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

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

bool is_16_bit(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
}

}  // namespace

at::Tensor tree_scan(
    const at::Tensor& x,
    const at::Tensor& decay,
    const at::Tensor& parent,
    const at::Tensor& order,
    c10::string_view propagation_name) {
  const Propagation propagation = parse_propagation(propagation_name);
  check_scan_inputs(x, decay, parent, order);
  const c10::cuda::CUDAGuard guard(x.device());
  if (is_16_bit(x)) {
    return tree_scan(x.to(at::kFloat), decay.to(at::kFloat), parent, order, propagation_name).to(x.scalar_type());
  }
  at::Tensor h = at::empty(x.sizes(), x.options());
  if (h.numel() == 0) {
    return h;
  }
  const PieceTensors cut = cut_trees(parent.contiguous(), order.contiguous());
  const at::Tensor x_rows = x.contiguous(), decay_rows = decay.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tree_scan", [&] {
    const GivenInput<scalar_t> input{
        decay_rows.const_data_ptr<scalar_t>(), {x_rows.const_data_ptr<scalar_t>(), nullptr}, x.size(2)};
    scan_forward<scalar_t>(input, propagation, cut.pieces, h);
  });
  return h;
}

std::tuple<at::Tensor, at::Tensor> tree_scan_backward(
    const at::Tensor& grad_h,
    const at::Tensor& x,
    const at::Tensor& decay,
    const at::Tensor& parent,
    const at::Tensor& order,
    c10::string_view propagation_name) {
  const Propagation propagation = parse_propagation(propagation_name);
  check_scan_inputs(x, decay, parent, order);
  check_scan_gradient(grad_h, x);
  const c10::cuda::CUDAGuard guard(x.device());
  if (is_16_bit(x)) {
    const auto [grad_x, grad_decay] = tree_scan_backward(
        grad_h.to(at::kFloat), x.to(at::kFloat), decay.to(at::kFloat), parent, order, propagation_name);
    return {grad_x.to(x.scalar_type()), grad_decay.to(x.scalar_type())};
  }
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  at::Tensor grad_decay = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) {
    return {grad_x, grad_decay};
  }
  const PieceTensors cut = cut_trees(parent.contiguous(), order.contiguous());
  const at::Tensor grad_rows = grad_h.contiguous(), x_rows = x.contiguous(), decay_rows = decay.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "tree_scan_backward", [&] {
    const GivenInput<scalar_t> input{
        decay_rows.const_data_ptr<scalar_t>(),
        {x_rows.const_data_ptr<scalar_t>(), grad_rows.const_data_ptr<scalar_t>()},
        x.size(2)};
    scan_backward<scalar_t>(input, propagation, cut.pieces, grad_x, grad_decay);
  });
  return {grad_x, grad_decay};
}

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("tree_scan", &tree_scan);
  m.impl("tree_scan_backward", &tree_scan_backward);
}

}  // namespace grootvl::cuda
