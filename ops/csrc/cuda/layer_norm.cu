// CUDA operators of the layer norm; layer_norm_rows.cuh has the kernels. Gradients of parameters are summed over
// blocks, whose number depends on the shape only, so results are deterministic.
#include "layer_norm.h"

#include <ATen/ops/layer_norm.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cuda/layer_norm_rows.cuh"
#include "cuda/packs.cuh"

namespace grootvl::cuda {

namespace {

// The widest rows of our kernels; for wider ones, PyTorch's kernel with a block per row is as fast.
constexpr int64_t kMostChannels = 1024;

// Calls call(layout) with the layout for rows of `channels`; `packed` if they can be read in packs of four.
template <typename Call>
void with_layout(int64_t channels, bool packed, const Call& call) {
  constexpr int kWidth = 4, kFew = 4, kMany = 8, kSingle = kMostChannels / kWarpSize;
  if (!packed || channels % kWidth != 0) {
    return call(Layout<1, kSingle>{kWarpSize, static_cast<int>(channels)});
  }
  const int packs = static_cast<int>(channels / kWidth);
  if (packs > kFew * kWarpSize) {
    return call(Layout<kWidth, kMany>{kWarpSize, static_cast<int>(channels)});
  }
  int lanes = 1;
  while (lanes * kFew < packs) {
    lanes *= 2;
  }
  call(Layout<kWidth, kFew>{lanes, static_cast<int>(channels)});
}

template <typename acc_t>
Factor<acc_t> factor_of(const LayerNormInputs& in, int64_t rows) {
  return {in.factor.defined() ? in.factor.const_data_ptr<acc_t>() : nullptr, rows / in.x.size(0)};
}

AnyOutput output_of(const at::Tensor& tensor) {
  return tensor.defined() ? AnyOutput{tensor.mutable_data_ptr(), tensor.scalar_type()} : AnyOutput{nullptr, at::kFloat};
}

// The number of blocks of the backward kernel: each lane gets so many rows that writing its sums costs little.
unsigned count_backward_blocks(int64_t rows, int lanes) {
  constexpr int64_t kRowsEach = 4, kMostBlocks = 1056;
  return static_cast<unsigned>(std::min(divide_up<int64_t>(rows, kThreads / lanes * kRowsEach), kMostBlocks));
}

// ---- rows with more channels, by PyTorch's kernels ----

at::Tensor sample_factor(const LayerNormInputs& in) {
  std::vector<int64_t> shape(in.x.dim(), 1);
  shape[0] = in.x.size(0);
  return in.factor.view(shape);
}

void forward_of_wide_rows(const LayerNormInputs& in, at::Tensor& sum, at::Tensor& normed) {
  const at::ScalarType dtype = in.weight.scalar_type();
  at::Tensor value = in.x;
  if (in.branch.defined()) {
    const at::Tensor branch = in.branch.to(dtype);
    sum.copy_(in.x.to(dtype).add(in.factor.defined() ? branch.mul(sample_factor(in)) : branch));
    value = sum;
  }
  normed.copy_(at::layer_norm(value.to(dtype), {value.size(-1)}, in.weight, in.bias, in.eps));
}

at::Tensor backward_of_wide_rows(
    const at::Tensor& grad_sum,
    const at::Tensor& grad_normed,
    const LayerNormInputs& in,
    at::Tensor& grad_x,
    const at::Tensor& grad_branch) {
  const at::ScalarType dtype = in.weight.scalar_type();
  const at::Tensor value = in.x.to(dtype);
  const auto [normed, mean, scale] = at::native_layer_norm(value, {value.size(-1)}, in.weight, {}, in.eps);
  auto [grad, of_weight, of_bias] = at::native_layer_norm_backward(
      grad_normed.to(dtype), value, {value.size(-1)}, mean, scale, in.weight, in.weight, {true, true, true});
  if (grad_sum.defined()) {
    grad.add_(grad_sum);
  }
  grad_x.copy_(grad);
  if (grad_branch.defined()) {
    grad_branch.copy_(in.factor.defined() ? grad.mul(sample_factor(in)) : grad);
  }
  return at::stack({of_weight, of_bias});
}

struct Cuda {
  using Scope = c10::cuda::CUDAGuard;

  static void forward(const LayerNormInputs& in, at::Tensor& sum, at::Tensor& normed) {
    const int64_t channels = in.x.size(-1), rows = in.x.numel() / channels;
    if (channels > kMostChannels) {
      return forward_of_wide_rows(in, sum, normed);
    }
    bool packed = true;
    for (const at::Tensor& tensor : {in.x, in.branch, in.weight, in.bias}) {
      packed = packed && (!tensor.defined() || starts_pack(tensor, 4));
    }
    with_layout(channels, packed, [&](auto layout) {
      with_scalar(in.x.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using acc_t = Accumulated<scalar_t>;
        const auto run = [&](const auto* branch) {
          using branch_t = std::remove_const_t<std::remove_pointer_t<decltype(branch)>>;
          const int64_t blocks = divide_up<int64_t>(rows, kThreads / layout.lanes);
          TORCH_CHECK_VALUE(
              blocks <= std::numeric_limits<int>::max(), "x has too many rows for one call, got ", in.x.sizes());
          launch(
              layer_norm_kernel<decltype(layout), scalar_t, branch_t, acc_t>,
              dim3(static_cast<unsigned>(blocks)),
              kThreads,
              0,
              layout,
              Forward<scalar_t, branch_t, acc_t>{
                  in.x.const_data_ptr<scalar_t>(),
                  branch,
                  factor_of<acc_t>(in, rows),
                  in.weight.const_data_ptr<acc_t>(),
                  in.bias.const_data_ptr<acc_t>(),
                  static_cast<acc_t>(in.eps),
                  rows,
                  sum.defined() ? sum.mutable_data_ptr<scalar_t>() : nullptr,
                  output_of(normed)});
        };
        if (!in.branch.defined()) {
          return run(static_cast<const void*>(nullptr));
        }
        with_same_or_16_bit<scalar_t>(
            in.branch.scalar_type(), [&](auto of_branch) { run(in.branch.const_data_ptr<decltype(of_branch)>()); });
      });
    });
  }

  static at::Tensor backward(
      const at::Tensor& grad_sum,
      const at::Tensor& grad_normed,
      const LayerNormInputs& in,
      at::Tensor& grad_x,
      const at::Tensor& grad_branch) {
    const int64_t channels = in.x.size(-1), rows = in.x.numel() / channels;
    if (channels > kMostChannels) {
      return backward_of_wide_rows(grad_sum, grad_normed, in, grad_x, grad_branch);
    }
    bool packed = true;
    for (const at::Tensor& tensor : {grad_sum, grad_normed, in.x, in.weight}) {
      packed = packed && (!tensor.defined() || starts_pack(tensor, 4));
    }
    at::Tensor sums;
    with_layout(channels, packed, [&](auto layout) {
      const unsigned blocks = count_backward_blocks(rows, layout.lanes);
      sums = at::empty({blocks, 2, channels}, in.weight.options());
      with_scalar(in.x.scalar_type(), [&](auto zero) {
        using scalar_t = decltype(zero);
        using acc_t = Accumulated<scalar_t>;
        with_same_or_16_bit<scalar_t>(grad_normed.scalar_type(), [&](auto of_grad) {
          using grad_t = decltype(of_grad);
          launch(
              layer_norm_backward_kernel<decltype(layout), scalar_t, grad_t, acc_t>,
              dim3(blocks),
              kThreads,
              2 * channels * static_cast<int64_t>(sizeof(acc_t)),
              layout,
              Backward<scalar_t, grad_t, acc_t>{
                  grad_sum.defined() ? grad_sum.const_data_ptr<scalar_t>() : nullptr,
                  in.x.const_data_ptr<scalar_t>(),
                  grad_normed.const_data_ptr<grad_t>(),
                  factor_of<acc_t>(in, rows),
                  in.weight.const_data_ptr<acc_t>(),
                  static_cast<acc_t>(in.eps),
                  rows,
                  grad_x.mutable_data_ptr<scalar_t>(),
                  output_of(grad_branch),
                  sums.mutable_data_ptr<acc_t>()});
        });
      });
    });
    return sums.sum(0);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(grootvl, CUDA, m) {
  m.impl("layer_norm", &LayerNormOperators<Cuda>::forward);
  m.impl("residual_layer_norm", &LayerNormOperators<Cuda>::residual);
  m.impl("layer_norm_backward", &LayerNormOperators<Cuda>::backward);
}

}  // namespace grootvl::cuda
