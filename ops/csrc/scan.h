// Scans along rooted trees: the contract on every device, and its checks.
//
// tree_scan(x, decay, parent, order, propagation, cut) -> h
//   x, decay (B, L, D), the same floating dtype; parent, order (B, L) int32 as grid_tree returns them; any strides.
//   h (B, L, D) contiguous:
//     up    u_v = x_v + sum over children c of decay_c * u_c;  h = u
//     down  h_root = x_root;  h_v = x_v + decay_v * h_parent(v)
//     all   h_root = u_root;  h_v = u_v + decay_v * (h_parent(v) - decay_v * u_v)
//   16-bit values are accumulated in float32.
// tree_scan_backward(grad_h, x, decay, parent, order, propagation, cut) -> (grad_x, grad_decay)
//   Both (B, L, D) contiguous; the gradient of the root's decay is 0.
// tree_cut(parent, order) -> cut
//   The trees cut into pieces that can be scanned in parallel, (B, N) int32. It saves scans along the same trees from
//   cutting them again; it is valid only on this device. Devices without this operator ignore the argument.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/util/string_view.h>

#include <tuple>

#include "checks.h"

namespace grootvl {

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
  check_device("decay", decay, x);
  check_device("parent", parent, x);
  check_device("order", order, x);
}

// Both operators for any valid input. A device implements them for non-empty inputs and fills the results:
//   Device::forward(x, decay, parent, order, cut, propagation, h);
//   Device::backward(grad_h, x, decay, parent, order, cut, propagation, grad_x, grad_decay);
//   Device::computes(x): false for 16-bit inputs that must be cast to float32 first;
//   Device::Scope(device) is alive during the call.
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
    check_gradient("grad_h", grad_h, x);
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
