// Layer norm over the last axis, alone or behind a residual connection, in one pass over memory: what the operators
// promise on every device, and the checks they share.
//
// layer_norm(x, weight, bias, eps, dtype) -> normed
//   x (..., C), any strides; weight, bias (C), in the dtype of x or, where x has 16 bits, in float32. normed
//   contiguous:
//     normed = (x - mean) / sqrt(variance + eps) * weight + bias, over C
// residual_layer_norm(x, branch, factor, weight, bias, eps, dtype) -> (sum, normed)
//   branch of the shape of x (B, ..., C); factor None or (B). sum in the dtype of x, both contiguous:
//     sum = x + factor * branch;  normed = layer_norm(sum, weight, bias, eps, dtype)
// layer_norm_backward(grad_sum, grad_normed, value, factor, weight, eps, branch_dtype) ->
//     (grad_x, grad_branch, grad_weight, grad_bias)
//   value is what was normed: x or sum; grad_sum None where nothing else uses it. grad_x is the gradient of value, the
//   two gradients added up, and grad_branch = factor * grad_x in branch_dtype; without a branch_dtype it has no
//   elements. factor gets no gradient.
//
// A float32 x may come with a branch of 16 bits and leave as 16 bits: `dtype` and the dtype of branch are those of x,
// or float16 or bfloat16 where x is float32; dtype None is that of x. 16-bit values are computed in float32; sum is
// rounded before it is normed, so that the backward pass, which computes the moments again, sees the same.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "scan.h"

namespace grootvl {

// What is normed. branch and factor are undefined where there is none.
struct LayerNormInputs {
  at::Tensor x, branch, factor, weight, bias;
  double eps;
};

// The dtype that is computed in.
inline at::ScalarType accumulated_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_norm_dtype(const char* name, at::ScalarType dtype, const at::Tensor& x) {
  const bool narrow = dtype == at::kHalf || dtype == at::kBFloat16;
  TORCH_CHECK_TYPE(
      dtype == x.scalar_type() || (narrow && x.scalar_type() == at::kFloat),
      name,
      " must be that of x ",
      x.scalar_type(),
      ", or have 16 bits where x is float32, got ",
      dtype);
}

inline void check_norm_tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == shape, name, " must have shape ", shape, " for x ", x.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(
      tensor.device() == x.device(), name, " must be on the device of x ", x.device(), ", got ", tensor.device());
}

inline void check_layer_norm_inputs(const LayerNormInputs& in) {
  const at::Tensor& x = in.x;
  TORCH_CHECK_VALUE(x.dim() > 0 && x.is_floating_point(), "x must be floating (..., C), got ", x.toString(), x.sizes());
  const auto check_parameter = [&](const char* name, const at::Tensor& parameter) {
    check_norm_tensor(name, parameter, {x.size(-1)}, x);
    const at::ScalarType dtype = parameter.scalar_type();
    TORCH_CHECK_TYPE(
        dtype == x.scalar_type() || dtype == accumulated_dtype(x.scalar_type()),
        name,
        " must have the dtype of x ",
        x.scalar_type(),
        " or float32 where that has 16 bits, got ",
        dtype);
  };
  check_parameter("weight", in.weight);
  check_parameter("bias", in.bias);
  if (in.branch.defined()) {
    check_norm_tensor("branch", in.branch, x.sizes(), x);
    check_norm_dtype("the dtype of branch", in.branch.scalar_type(), x);
  }
  if (in.factor.defined()) {
    TORCH_CHECK_VALUE(x.dim() > 1, "a factor for each sample needs x (B, ..., C), got ", x.sizes());
    check_norm_tensor("factor", in.factor, {x.size(0)}, x);
  }
}

// The operators for any input, from what a device computes of contiguous tensors that are not empty, with parameters
// and factor in the dtype that is computed in:
//   Device::forward(inputs, sum, normed), sum undefined without a branch, and
//   Device::backward(grad_sum or undefined, grad_normed, inputs, grad_x, grad_branch or undefined) -> (2, C), the
//     gradients of weight and bias; of the inputs, x is the value, and branch and bias are undefined;
//   Device::Scope, made from the inputs' device, lives meanwhile.
template <typename Device>
struct LayerNormOperators {
  using OptionalTensor = c10::optional<at::Tensor>;
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
    check_norm_tensor("grad_normed", grad_normed, value.sizes(), value);
    check_norm_dtype("the dtype of grad_normed", grad_normed.scalar_type(), value);
    at::Tensor of_sum = grad_sum.value_or(at::Tensor());
    if (of_sum.defined()) {
      check_norm_tensor("grad_sum", of_sum, value.sizes(), value);
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
    // Two tensors of their own: what an operator returns may not share memory.
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
