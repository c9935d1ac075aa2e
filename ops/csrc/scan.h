// Scans along rooted trees: what the operators promise on every device, and the checks they share.
//
// tree_scan(x, decay, parent, order, propagation, cut) -> h
//   x, decay (B, L, D), one floating dtype; parent, order (B, L) int32 as grid_tree returns them; any strides. h (B, L,
//   D) contiguous:
//     up    u_v = x_v + sum over children c of decay_c * u_c;  h = u
//     down  h_root = x_root;  h_v = x_v + decay_v * h_parent(v)
//     all   h_root = u_root;  h_v = u_v + decay_v * (h_parent(v) - decay_v * u_v)
//   16-bit values are accumulated in float32.
// tree_scan_backward(grad_h, x, decay, parent, order, propagation, cut) -> (grad_x, grad_decay)
//   for the gradient of h; each (B, L, D) contiguous; that of the root's decay is 0.
// tree_cut(parent, order) -> cut
//   what a device can know of trees before it scans along them, (B, N) int32, only for its scans along the same trees,
//   which otherwise find it out themselves. Devices without this operator ignore what they are given.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Optional.h>
#include <c10/util/string_view.h>

#include <tuple>

namespace grootvl {

using OptionalTensor = c10::optional<at::Tensor>;

enum class Propagation { kAll, kUp, kDown };

inline Propagation parse_propagation(c10::string_view name) {
  if (name == "all") {
    return Propagation::kAll;
  }
  TORCH_CHECK_VALUE(name == "up" || name == "down", "propagation must be one of all, up, down, got '", name, "'");
  return name == "up" ? Propagation::kUp : Propagation::kDown;
}

inline void check_scan_inputs(
    const at::Tensor& x, const at::Tensor& decay, const at::Tensor& parent, const at::Tensor& order) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && decay.sizes() == x.sizes(),
      "x and decay must have the same shape (B, L, D), got ",
      x.sizes(),
      " and ",
      decay.sizes());
  TORCH_CHECK_TYPE(
      decay.scalar_type() == x.scalar_type(),
      "decay must have the dtype of x ",
      x.scalar_type(),
      ", got ",
      decay.scalar_type());
  for (const at::Tensor& vertices : {parent, order}) {
    TORCH_CHECK_TYPE(
        vertices.scalar_type() == at::kInt, "parent and order must be int32, got ", vertices.scalar_type());
    TORCH_CHECK_VALUE(
        vertices.sizes() == x.sizes().slice(0, 2),
        "parent and order must have the shape (B, L) of x ",
        x.sizes(),
        ", got ",
        vertices.sizes());
  }
  for (const at::Tensor& other : {decay, parent, order}) {
    TORCH_CHECK_VALUE(
        other.device() == x.device(), "all inputs must be on the device of x ", x.device(), ", got ", other.device());
  }
}

inline void check_scan_gradient(const at::Tensor& grad_h, const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      grad_h.sizes() == x.sizes() && grad_h.scalar_type() == x.scalar_type() && grad_h.device() == x.device(),
      "grad_h must have the shape, dtype and device of x ",
      x.sizes(),
      ' ',
      x.scalar_type(),
      ' ',
      x.device(),
      ", got ",
      grad_h.sizes(),
      ' ',
      grad_h.scalar_type(),
      ' ',
      grad_h.device());
}

inline bool is_16_bit(const at::Tensor& x) {
  return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
}

// For devices that need nothing set while they compute.
struct NoScope {
  explicit NoScope(c10::Device) {}
};

// Both operators for any input, from what a device computes for inputs that are not empty:
//   Device::forward(x, decay, parent, order, cut, propagation, h) and
//   Device::backward(grad_h, x, decay, parent, order, cut, propagation, grad_x, grad_decay), results last;
//   Device::computes(x) tells whether it takes these; 16-bit inputs that it does not are cast to float32;
//   Device::Scope, made from the inputs' device, lives meanwhile.
template <typename Device>
struct ScanOperators {
  static at::Tensor forward(
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      c10::string_view propagation_name,
      const OptionalTensor& cut) {
    const Propagation propagation = parse_propagation(propagation_name);
    check_scan_inputs(x, decay, parent, order);
    const typename Device::Scope scope(x.device());
    if (!Device::computes(x)) {
      return forward(x.to(at::kFloat), decay.to(at::kFloat), parent, order, propagation_name, cut).to(x.scalar_type());
    }
    at::Tensor h = at::empty(x.sizes(), x.options());
    if (h.numel() > 0) {
      Device::forward(x, decay, parent, order, cut, propagation, h);
    }
    return h;
  }

  static std::tuple<at::Tensor, at::Tensor> backward(
      const at::Tensor& grad_h,
      const at::Tensor& x,
      const at::Tensor& decay,
      const at::Tensor& parent,
      const at::Tensor& order,
      c10::string_view propagation_name,
      const OptionalTensor& cut) {
    const Propagation propagation = parse_propagation(propagation_name);
    check_scan_inputs(x, decay, parent, order);
    check_scan_gradient(grad_h, x);
    const typename Device::Scope scope(x.device());
    if (!Device::computes(x)) {
      const auto [grad_x, grad_decay] =
          backward(grad_h.to(at::kFloat), x.to(at::kFloat), decay.to(at::kFloat), parent, order, propagation_name, cut);
      return {grad_x.to(x.scalar_type()), grad_decay.to(x.scalar_type())};
    }
    at::Tensor grad_x = at::empty(x.sizes(), x.options());
    at::Tensor grad_decay = at::empty(x.sizes(), x.options());
    if (x.numel() > 0) {
      Device::backward(grad_h, x, decay, parent, order, cut, propagation, grad_x, grad_decay);
    }
    return {grad_x, grad_decay};
  }
};

}  // namespace grootvl
