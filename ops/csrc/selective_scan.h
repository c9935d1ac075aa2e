// The selective scan of a tree state space layer, everything between its projections: what the operators promise on
// every device, and the checks they share.
//
// tree_selective_scan(x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias, out_norm_weight,
//                     out_norm_bias, parent, order, eps, propagation, cut) -> y
//   x, gate (B, L, D), dt (B, L, R), b, c (B, L, 1), the activations, of one floating dtype; dt_weight (D, R) and the
//   other parameters (D) of the same, or of float32 beside 16-bit activations; parent, order (B, L) int32 as grid_tree
//   returns them; any strides. y (B, L, D) contiguous, of the dtype of x:
//     delta = softplus(dt dt_weight^T + dt_bias);  decay = exp(-exp(A_log) delta)
//     h     = tree_scan(delta b x, decay, parent, order, propagation)
//     y     = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate)
//   16-bit values are computed in float32; decays never have 16 bits. The cut is that of scan.h.
// tree_selective_scan_backward(grad_y, ... the same ...) -> the gradients of the 13 floating inputs, in their order and
//   dtypes
//   Nothing but the inputs is needed: decay, input and h are computed again.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <tuple>

#include "scan.h"

namespace grootvl {

struct SelectiveScanInputs {
  at::Tensor x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds;
  at::Tensor h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias;

  // The same with every tensor changed.
  template <typename Change>
  SelectiveScanInputs map(const Change& change) const {
    return {
        change(x),
        change(dt),
        change(b),
        change(c),
        change(gate),
        change(dt_weight),
        change(dt_bias),
        change(A_log),
        change(Ds),
        change(h_norm_weight),
        change(h_norm_bias),
        change(out_norm_weight),
        change(out_norm_bias)};
  }

  // The same with the activations (the first five) changed in one way and the parameters in another.
  template <typename Activation, typename Parameter>
  SelectiveScanInputs map_parts(const Activation& activation, const Parameter& parameter) const {
    int index = 0;
    return map(
        [&](const at::Tensor& tensor) { return index++ < kActivations ? activation(tensor) : parameter(tensor); });
  }

  static constexpr int kActivations = 5;
};

inline void check_selective_scan_inputs(
    const SelectiveScanInputs& in, const at::Tensor& parent, const at::Tensor& order) {
  // Rank, and that parent and order belong to x.
  check_scan_inputs(in.x, in.x, parent, order);
  const int64_t batch = in.x.size(0), vertices = in.x.size(1), channels = in.x.size(2);
  const int64_t rank = in.dt_weight.dim() == 2 ? in.dt_weight.size(1) : -1;
  const auto check = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType dtype) {
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == dtype,
        name,
        " must be of dtype ",
        dtype,
        " beside x of dtype ",
        in.x.scalar_type(),
        ", got ",
        tensor.scalar_type());
    TORCH_CHECK_VALUE(
        tensor.device() == in.x.device(),
        name,
        " must be on the device of x ",
        in.x.device(),
        ", got ",
        tensor.device());
  };
  const at::ScalarType activation = in.x.scalar_type();
  const bool keeps_float = is_16_bit(in.x) && in.dt_weight.scalar_type() == at::kFloat;
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

// Both operators for any input, from what a device computes:
//   Device::forward(inputs, parent, order, cut, eps, propagation) -> y and
//   Device::backward(grad_y, inputs, parent, order, cut, eps, propagation) -> gradients;
//   Device::computes(x) tells whether it takes these; 16-bit inputs that it does not are cast to float32;
//   Device::Scope, made from the inputs' device, lives meanwhile.
template <typename Device>
struct SelectiveScanOperators {
  using At = at::Tensor;
  using Gradients = std::tuple<At, At, At, At, At, At, At, At, At, At, At, At, At>;

  static at::Tensor forward(
      const at::Tensor& x,
      const at::Tensor& dt,
      const at::Tensor& b,
      const at::Tensor& c,
      const at::Tensor& gate,
      const at::Tensor& dt_weight,
      const at::Tensor& dt_bias,
      const at::Tensor& A_log,
      const at::Tensor& Ds,
      const at::Tensor& h_norm_weight,
      const at::Tensor& h_norm_bias,
      const at::Tensor& out_norm_weight,
      const at::Tensor& out_norm_bias,
      const at::Tensor& parent,
      const at::Tensor& order,
      double eps,
      c10::string_view propagation_name,
      const OptionalTensor& cut) {
    const Propagation propagation = parse_propagation(propagation_name);
    const SelectiveScanInputs inputs{
        x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias};
    check_selective_scan_inputs(inputs, parent, order);
    const typename Device::Scope scope(x.device());
    if (!Device::computes(x)) {
      return Device::forward(inputs.map(to_float), parent, order, cut, eps, propagation).to(x.scalar_type());
    }
    return Device::forward(inputs, parent, order, cut, eps, propagation);
  }

  static Gradients backward(
      const at::Tensor& grad_y,
      const at::Tensor& x,
      const at::Tensor& dt,
      const at::Tensor& b,
      const at::Tensor& c,
      const at::Tensor& gate,
      const at::Tensor& dt_weight,
      const at::Tensor& dt_bias,
      const at::Tensor& A_log,
      const at::Tensor& Ds,
      const at::Tensor& h_norm_weight,
      const at::Tensor& h_norm_bias,
      const at::Tensor& out_norm_weight,
      const at::Tensor& out_norm_bias,
      const at::Tensor& parent,
      const at::Tensor& order,
      double eps,
      c10::string_view propagation_name,
      const OptionalTensor& cut) {
    const Propagation propagation = parse_propagation(propagation_name);
    const SelectiveScanInputs inputs{
        x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias};
    check_selective_scan_inputs(inputs, parent, order);
    check_scan_gradient(grad_y, x);
    const typename Device::Scope scope(x.device());
    SelectiveScanInputs g;
    if (!Device::computes(x)) {
      g = Device::backward(to_float(grad_y), inputs.map(to_float), parent, order, cut, eps, propagation)
              .map_parts(
                  [&](const at::Tensor& grad) { return grad.to(x.scalar_type()); },
                  [&](const at::Tensor& grad) { return grad.to(dt_weight.scalar_type()); });
    } else {
      g = Device::backward(grad_y, inputs, parent, order, cut, eps, propagation);
    }
    return {
        g.x,
        g.dt,
        g.b,
        g.c,
        g.gate,
        g.dt_weight,
        g.dt_bias,
        g.A_log,
        g.Ds,
        g.h_norm_weight,
        g.h_norm_bias,
        g.out_norm_weight,
        g.out_norm_bias};
  }
};

}  // namespace grootvl
