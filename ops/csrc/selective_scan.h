// The selective scan of a tree state space layer, from the outputs of its projections to the input of out_proj: the
// contract on every device, and its checks.
//
// tree_selective_scan(x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias, out_norm_weight,
//                     out_norm_bias, parent, order, eps, propagation, cut) -> y
//   Activations x, gate (B, L, D), dt (B, L, R), b, c (B, L, 1), the same floating dtype. Parameters dt_weight (D, R),
//   the others (D), the dtype of x, or all float32 if x is 16-bit. parent, order (B, L) int32 as grid_tree returns
//   them. Any strides. y (B, L, D) contiguous, dtype of x:
//     delta = softplus(dt dt_weight^T + dt_bias);  decay = exp(-exp(A_log) delta)
//     h     = tree_scan(delta b x, decay, parent, order, propagation)
//     y     = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate)
//   16-bit inputs are computed in float32; decays are never rounded to 16 bits. For cut, see scan.h.
// tree_selective_scan_backward(grad_y, <the same arguments>) -> the gradients of the 13 floating inputs, in their order
//   and dtypes. Recomputes decay, scan input and h, so only the inputs are saved.
#pragma once

#include <c10/util/string_view.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "scan.h"

namespace grootvl {

struct SelectiveScanInputs {
  at::Tensor x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds;
  at::Tensor h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias;

  static constexpr int kActivations = 5;  // the first five; the others are parameters

  // References to all tensors, in the order of the operators' arguments.
  auto all() const {
    return std::tie(
        x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias);
  }

  // Applies `change` to every tensor.
  template <typename Change>
  SelectiveScanInputs map(const Change& change) const {
    return std::apply([&](const auto&... tensor) { return SelectiveScanInputs{change(tensor)...}; }, all());
  }

  // Applies `activation` to the activations and `parameter` to the parameters.
  template <typename Activation, typename Parameter>
  SelectiveScanInputs map_parts(const Activation& activation, const Parameter& parameter) const {
    int index = 0;
    return map(
        [&](const at::Tensor& tensor) { return index++ < kActivations ? activation(tensor) : parameter(tensor); });
  }
};

inline void check_selective_scan_inputs(
    const SelectiveScanInputs& in, const at::Tensor& parent, const at::Tensor& order) {
  check_scan_inputs(in.x, in.x, parent, order);  // the rank of x, and the trees
  const int64_t batch = in.x.size(0), vertices = in.x.size(1), channels = in.x.size(2);
  const int64_t rank = in.dt_weight.dim() == 2 ? in.dt_weight.size(1) : -1;
  const auto check = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
    check_tensor(name, tensor, shape, in.x);
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == dtype,
        name,
        " must be ",
        dtype,
        " for x ",
        in.x.scalar_type(),
        " and dt_weight ",
        in.dt_weight.scalar_type(),
        ", got ",
        tensor.scalar_type());
  };
  const at::ScalarType activation = in.x.scalar_type();
  const bool keeps_float = is_16_bit(in.x.scalar_type()) && in.dt_weight.scalar_type() == at::kFloat;
  const at::ScalarType parameter = keeps_float ? at::kFloat : activation;
  check("dt_weight", in.dt_weight, {channels, rank}, parameter);
  check("dt", in.dt, {batch, vertices, rank}, activation);
  check("b", in.b, {batch, vertices, 1}, activation);
  check("c", in.c, {batch, vertices, 1}, activation);
  check("gate", in.gate, {batch, vertices, channels}, activation);
  check("dt_bias", in.dt_bias, {channels}, parameter);
  check("A_log", in.A_log, {channels}, parameter);
  check("Ds", in.Ds, {channels}, parameter);
  check("h_norm_weight", in.h_norm_weight, {channels}, parameter);
  check("h_norm_bias", in.h_norm_bias, {channels}, parameter);
  check("out_norm_weight", in.out_norm_weight, {channels}, parameter);
  check("out_norm_bias", in.out_norm_bias, {channels}, parameter);
}

inline at::Tensor to_float(const at::Tensor& tensor) {
  return tensor.to(at::kFloat);
}

// Both operators for any valid input. A device implements them:
//   Device::forward(inputs, parent, order, cut, eps, propagation) -> y;
//   Device::backward(grad_y, inputs, parent, order, cut, eps, propagation) -> gradients;
//   Device::computes(x): false for 16-bit inputs that must be cast to float32 first;
//   Device::Scope(device) is alive during the call.
// Inputs... are the 13 tensors of SelectiveScanInputs.
template <typename Device, typename = decltype(std::declval<const SelectiveScanInputs&>().all())>
struct SelectiveScanOperators;

template <typename Device, typename... Inputs>
struct SelectiveScanOperators<Device, std::tuple<Inputs...>> {
  using Gradients = std::tuple<std::decay_t<Inputs>...>;

  static at::Tensor forward(
      Inputs... tensors,
      const at::Tensor& parent,
      const at::Tensor& order,
      double eps,
      c10::string_view propagation_name,
      const OptionalTensor& cut) {
    const Propagation propagation = parse_propagation(propagation_name);
    const SelectiveScanInputs inputs{tensors...};
    check_selective_scan_inputs(inputs, parent, order);
    const typename Device::Scope scope(inputs.x.device());
    if (!Device::computes(inputs.x)) {
      return Device::forward(inputs.map(to_float), parent, order, cut, eps, propagation).to(inputs.x.scalar_type());
    }
    return Device::forward(inputs, parent, order, cut, eps, propagation);
  }

  static Gradients backward(
      const at::Tensor& grad_y,
      Inputs... tensors,
      const at::Tensor& parent,
      const at::Tensor& order,
      double eps,
      c10::string_view propagation_name,
      const OptionalTensor& cut) {
    const Propagation propagation = parse_propagation(propagation_name);
    const SelectiveScanInputs inputs{tensors...};
    check_selective_scan_inputs(inputs, parent, order);
    check_gradient("grad_y", grad_y, inputs.x);
    const typename Device::Scope scope(inputs.x.device());
    if (Device::computes(inputs.x)) {
      return Device::backward(grad_y, inputs, parent, order, cut, eps, propagation).all();
    }
    const auto cast_to = [](const at::Tensor& input) {
      return [dtype = input.scalar_type()](const at::Tensor& grad) { return grad.to(dtype); };
    };
    return Device::backward(to_float(grad_y), inputs.map(to_float), parent, order, cut, eps, propagation)
        .map_parts(cast_to(inputs.x), cast_to(inputs.dt_weight))
        .all();
  }
};

}  // namespace grootvl
