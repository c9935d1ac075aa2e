// Layer norm over the last axis, optionally fused with the residual connection before it: the contract on every device,
// and its checks.
//
// layer_norm(x, weight, bias, eps, dtype) -> normed
//   x (..., C), any strides; weight, bias (C), dtype of x, or float32 if x is 16-bit. normed contiguous:
//     normed = (x - mean) / sqrt(variance + eps) * weight + bias, over C
// residual_layer_norm(x, branch, factor, weight, bias, eps, dtype) -> (sum, normed)
//   x, branch (B, ..., C); factor None or (B). sum has the dtype of x; both results are contiguous:
//     sum = x + factor * branch;  normed = layer_norm(sum, weight, bias, eps, dtype)
// layer_norm_backward(grad_sum, grad_normed, value, factor, weight, eps, branch_dtype) ->
//     (grad_x, grad_branch, grad_weight, grad_bias)
//   value is the normalized tensor, x or sum; grad_sum is None if sum has no other use. grad_x is the total gradient of
//   value, and grad_branch = factor * grad_x in branch_dtype, or an empty tensor without a branch_dtype. factor gets no
//   gradient.
//
// `dtype`, the dtype of normed, and the dtype of branch are those of x, or 16-bit if x is float32; dtype None means
// that of x. 16-bit values are accumulated in float32. sum is rounded before it is normalized: the backward pass
// recomputes the moments from the rounded values.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "checks.h"

namespace grootvl {

// branch and factor may be undefined.
struct LayerNormInputs {
  at::Tensor x, branch, factor, weight, bias;
  double eps;
};

inline void check_norm_dtype(const char* name, at::ScalarType dtype, const at::Tensor& x) {
  TORCH_CHECK_TYPE(
      dtype == x.scalar_type() || (is_16_bit(dtype) && x.scalar_type() == at::kFloat),
      name,
      " must be that of x ",
      x.scalar_type(),
      ", or 16-bit if x is float32, got ",
      dtype);
}

inline void check_layer_norm_inputs(const LayerNormInputs& in) {
  const at::Tensor& x = in.x;
  TORCH_CHECK_VALUE(x.dim() > 0 && x.is_floating_point(), "x must be floating (..., C), got ", x.toString(), x.sizes());
  check_parameter("weight", in.weight, {x.size(-1)}, x);
  check_parameter("bias", in.bias, {x.size(-1)}, x);
  if (in.branch.defined()) {
    check_tensor("branch", in.branch, x.sizes(), x);
    check_norm_dtype("the dtype of branch", in.branch.scalar_type(), x);
  }
  if (in.factor.defined()) {
    TORCH_CHECK_VALUE(x.dim() > 1, "a factor for each sample needs x (B, ..., C), got ", x.sizes());
    check_tensor("factor", in.factor, {x.size(0)}, x);
  }
}

// The operators for any valid input. A device implements them for non-empty contiguous tensors, with parameters and
// factor in the accumulation dtype:
//   Device::forward(inputs, sum, normed), sum undefined without a branch;
//   Device::backward(grad_sum, grad_normed, inputs, grad_x, grad_branch) -> (2, C), the gradients of weight and bias.
//     grad_sum and grad_branch may be undefined; inputs.x is the value, and inputs.branch is undefined;
//   Device::Scope(device) is alive during the call.
template <typename Device>
struct LayerNormOperators {
  using OptionalDtype = c10::optional<at::ScalarType>;

  static at::Tensor forward(
      const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, OptionalDtype dtype) {
    return std::get<1>(run({x, {}, {}, weight, bias, eps}, dtype));
  }

  static std::tuple<at::Tensor, at::Tensor> residual(
      const at::Tensor& x,
      const at::Tensor& branch,
      const OptionalTensor& factor,
      const at::Tensor& weight,
      const at::Tensor& bias,
      double eps,
      OptionalDtype dtype) {
    return run({x, branch, factor.value_or(at::Tensor()), weight, bias, eps}, dtype);
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
      const OptionalTensor& grad_sum,
      const at::Tensor& grad_normed,
      const at::Tensor& value,
      const OptionalTensor& factor,
      const at::Tensor& weight,
      double eps,
      OptionalDtype branch_dtype) {
    LayerNormInputs in{value, {}, factor.value_or(at::Tensor()), weight, weight, eps};
    check_layer_norm_inputs(in);
    check_tensor("grad_normed", grad_normed, value.sizes(), value);
    check_norm_dtype("the dtype of grad_normed", grad_normed.scalar_type(), value);
    at::Tensor of_sum = grad_sum.value_or(at::Tensor());
    if (of_sum.defined()) {
      check_tensor("grad_sum", of_sum, value.sizes(), value);
      TORCH_CHECK_TYPE(
          of_sum.scalar_type() == value.scalar_type(),
          "grad_sum must have the dtype of value ",
          value.scalar_type(),
          ", got ",
          of_sum.scalar_type());
      of_sum = of_sum.contiguous();
    }
    if (branch_dtype.has_value()) {
      check_norm_dtype("branch_dtype", *branch_dtype, value);
    }
    const typename Device::Scope scope(value.device());
    at::Tensor grad_x = at::empty(value.sizes(), value.options());
    at::Tensor grad_branch = branch_dtype.has_value() ? at::empty(value.sizes(), value.options().dtype(*branch_dtype))
                                                      : at::empty({0}, value.options());
    if (value.numel() == 0) {
      return {
          grad_x,
          grad_branch,
          at::zeros(weight.sizes(), weight.options()),
          at::zeros(weight.sizes(), weight.options())};
    }
    const at::Tensor of_parameters = Device::backward(
        of_sum, grad_normed.contiguous(), prepare(in), grad_x, branch_dtype.has_value() ? grad_branch : at::Tensor());
    // Copies, since results of an operator must not alias each other.
    return {
        grad_x,
        grad_branch,
        of_parameters.select(0, 0).to(weight.scalar_type(), false, /*copy=*/true),
        of_parameters.select(0, 1).to(weight.scalar_type(), false, /*copy=*/true)};
  }

 private:
  static std::tuple<at::Tensor, at::Tensor> run(const LayerNormInputs& in, OptionalDtype dtype) {
    check_layer_norm_inputs(in);
    const at::ScalarType normed_dtype = dtype.value_or(in.x.scalar_type());
    check_norm_dtype("dtype", normed_dtype, in.x);
    const typename Device::Scope scope(in.x.device());
    at::Tensor sum = in.branch.defined() ? at::empty(in.x.sizes(), in.x.options()) : at::Tensor();
    at::Tensor normed = at::empty(in.x.sizes(), in.x.options().dtype(normed_dtype));
    if (in.x.numel() > 0) {
      Device::forward(prepare(in), sum, normed);
    }
    return {sum, normed};
  }

  static LayerNormInputs prepare(const LayerNormInputs& in) {
    const at::ScalarType dtype = accumulated_dtype(in.x.scalar_type());
    const auto contiguous = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.contiguous() : tensor; };
    const auto accumulated = [&](const at::Tensor& tensor) {
      return contiguous(tensor.defined() ? tensor.to(dtype) : tensor);
    };
    return {
        contiguous(in.x),
        contiguous(in.branch),
        accumulated(in.factor),
        accumulated(in.weight),
        accumulated(in.bias),
        in.eps};
  }
};

}  // namespace grootvl
