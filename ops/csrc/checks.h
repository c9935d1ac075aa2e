// Argument checks shared by all operators.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Optional.h>

#include "dtypes.h"

namespace grootvl {

using OptionalTensor = c10::optional<at::Tensor>;

// The `Scope` of devices that need no guard.
struct NoScope {
  explicit NoScope(c10::Device) {}
};

inline void check_device(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      tensor.device() == x.device(), name, " must be on the device of x ", x.device(), ", got ", tensor.device());
}

// Shape and device.
inline void check_tensor(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == shape, name, " must have shape ", shape, " for x ", x.sizes(), ", got ", tensor.sizes());
  check_device(name, tensor, x);
}

// Parameters have the dtype of x, or float32 if x is 16-bit.
inline void check_parameter(const char* name, const at::Tensor& parameter, at::IntArrayRef shape, const at::Tensor& x) {
  check_tensor(name, parameter, shape, x);
  TORCH_CHECK_TYPE(
      parameter.scalar_type() == x.scalar_type() || parameter.scalar_type() == accumulated_dtype(x.scalar_type()),
      name,
      " must have the dtype of x ",
      x.scalar_type(),
      ", or float32 if x is 16-bit, got ",
      parameter.scalar_type());
}

// The gradient of a result that has the shape, dtype and device of x.
inline void check_gradient(const char* name, const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
      name,
      " must have the shape, dtype and device of x ",
      x.sizes(),
      ' ',
      x.scalar_type(),
      ' ',
      x.device(),
      ", got ",
      grad.sizes(),
      ' ',
      grad.scalar_type(),
      ' ',
      grad.device());
}

}  // namespace grootvl
