// SiLU of the depth-wise 3x3 convolution of a tree state space layer: the contract on every device, and its checks.
//
// depthwise_conv_silu(x, weight) -> y
//   x (B, H, W, D), any strides; not copied if the last stride is 1, as in a slice of a projection's output. weight
//   (D, 1, 3, 3), dtype of x, or float32 if x is 16-bit. y (B, H, W, D) contiguous, dtype of x:
//     z(h, w) = sum over i, j of weight(i, j) x(h + i - 1, w + j - 1), with zero padding;  y = SiLU(z) = z sigmoid(z)
//   16-bit inputs are accumulated in float32 and rounded once.
// depthwise_conv_silu_backward(grad_y, x, weight) -> (grad_x, grad_weight)
//   Recomputes z, so only the inputs are saved. grad_x contiguous, dtype of x; grad_weight has the dtype of weight.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "checks.h"

namespace grootvl {

// Taps of the 3x3 kernel.
constexpr int kTaps = 9;

inline void check_depthwise_conv_inputs(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.is_floating_point(), "x must be floating (B, H, W, D), got ", x.toString(), x.sizes());
  check_parameter("weight", weight, {x.size(3), 1, 3, 3}, x);
}

// Both operators for any valid input. A device implements them for non-empty inputs; channels of x and grad_y have
// stride 1, and the weight is contiguous in the accumulation dtype:
//   Device::forward(x, weight, y);
//   Device::backward(grad_y, x, weight, grad_x) -> the gradient of the weight as (9, D);
//   Device::Scope(device) is alive during the call.
template <typename Device>
struct DepthwiseConvOperators {
  static at::Tensor forward(const at::Tensor& x, const at::Tensor& weight) {
    check_depthwise_conv_inputs(x, weight);
    const typename Device::Scope scope(x.device());
    at::Tensor y = at::empty(x.sizes(), x.options());
    if (y.numel() > 0) {
      Device::forward(with_dense_channels(x), accumulated(weight), y);
    }
    return y;
  }

  static std::tuple<at::Tensor, at::Tensor> backward(
      const at::Tensor& grad_y, const at::Tensor& x, const at::Tensor& weight) {
    check_depthwise_conv_inputs(x, weight);
    check_gradient("grad_y", grad_y, x);
    const typename Device::Scope scope(x.device());
    at::Tensor grad_x = at::empty(x.sizes(), x.options());
    if (x.numel() == 0) {
      return {grad_x, at::zeros(weight.sizes(), weight.options())};
    }
    const at::Tensor taps =
        Device::backward(with_dense_channels(grad_y), with_dense_channels(x), accumulated(weight), grad_x);
    return {grad_x, taps.t().contiguous().view(weight.sizes()).to(weight.scalar_type())};
  }

 private:
  static at::Tensor with_dense_channels(const at::Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
  }

  static at::Tensor accumulated(const at::Tensor& weight) {
    return weight.to(accumulated_dtype(weight.scalar_type())).contiguous();
  }
};

}  // namespace grootvl
