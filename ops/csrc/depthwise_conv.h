// The depth-wise 3x3 convolution of a tree state space layer with its SiLU: what the operators promise on every device,
// and the checks they share.
//
// depthwise_conv_silu(x, weight) -> y
//   x (B, H, W, D), any strides, read where it lies if the last is 1, as it is in a slice of a projection's result;
//   weight (D, 1, 3, 3), in the dtype of x or, where that has 16 bits, in float32. y (B, H, W, D) contiguous:
//     z(h, w) = sum over i, j of weight(i, j) x(h + i - 1, w + j - 1), x being 0 outside;  y = SiLU(z) = z sigmoid(z)
//   16-bit values are computed in float32 and rounded once.
// depthwise_conv_silu_backward(grad_y, x, weight) -> (grad_x, grad_weight)
//   Nothing but the inputs is needed: z is computed again. grad_x contiguous, in the dtype of x; grad_weight in that of
//   weight.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "layer_norm.h"

namespace grootvl {

// Taps of the kernel.
constexpr int kTaps = 9;

inline void check_depthwise_conv_inputs(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.is_floating_point(), "x must be floating (B, H, W, D), got ", x.toString(), x.sizes());
  const int64_t channels = x.size(3);
  TORCH_CHECK_VALUE(
      weight.sizes() == at::IntArrayRef({channels, 1, 3, 3}),
      "weight must have shape ",
      at::IntArrayRef({channels, 1, 3, 3}),
      " for x ",
      x.sizes(),
      ", got ",
      weight.sizes());
  TORCH_CHECK_TYPE(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == accumulated_dtype(x.scalar_type()),
      "weight must have the dtype of x ",
      x.scalar_type(),
      " or float32 where that has 16 bits, got ",
      weight.scalar_type());
  TORCH_CHECK_VALUE(
      weight.device() == x.device(), "weight must be on the device of x ", x.device(), ", got ", weight.device());
}

// Both operators for any input, from what a device computes of inputs that are not empty; x with channels side by side,
// the weight contiguous and in the dtype that is computed in:
//   Device::forward(x, weight, y) and
//   Device::backward(grad_y, x, weight, grad_x) -> the gradient of the weight as (9, D), grad_y like x;
//   Device::Scope, made from the inputs' device, lives meanwhile.
template <typename Device>
struct DepthwiseConvOperators {
  static at::Tensor forward(const at::Tensor& x, const at::Tensor& weight) {
    check_depthwise_conv_inputs(x, weight);
    const typename Device::Scope scope(x.device());
    at::Tensor y = at::empty(x.sizes(), x.options());
    if (y.numel() > 0) {
      Device::forward(channels_together(x), accumulated(weight), y);
    }
    return y;
  }

  static std::tuple<at::Tensor, at::Tensor> backward(
      const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight) {
    check_depthwise_conv_inputs(x, weight);
    TORCH_CHECK_VALUE(
        grad_y.sizes() == x.sizes() && grad_y.scalar_type() == x.scalar_type() && grad_y.device() == x.device(),
        "grad_y must have the shape, dtype and device of x ",
        x.sizes(),
        ' ',
        x.scalar_type(),
        ' ',
        x.device(),
        ", got ",
        grad_y.sizes(),
        ' ',
        grad_y.scalar_type(),
        ' ',
        grad_y.device());
    const typename Device::Scope scope(x.device());
    at::Tensor grad_x = at::empty(x.sizes(), x.options());
    if (x.numel() == 0) {
      return {grad_x, at::zeros(weight.sizes(), weight.options())};
    }
    const at::Tensor taps =
        Device::backward(channels_together(grad_y), channels_together(x), accumulated(weight), grad_x);
    return {grad_x, taps.t().contiguous().view(weight.sizes()).to(weight.scalar_type())};
  }

 private:
  static at::Tensor channels_together(const at::Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
  }

  static at::Tensor accumulated(const at::Tensor& weight) {
    return weight.to(accumulated_dtype(weight.scalar_type())).contiguous();
  }
};

}  // namespace grootvl
