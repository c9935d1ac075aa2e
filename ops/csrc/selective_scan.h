// The selective scan of a tree state space layer, everything between its projections: what the operators promise on
// every device, and the checks they share.
//
// tree_selective_scan(x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias, out_norm_weight,
//                     out_norm_bias, parent, order, eps, propagation) -> y
//   x, gate (B, L, D), dt (B, L, R), b, c (B, L, 1), dt_weight (D, R), the other parameters (D), one floating dtype;
//   parent, order (B, L) int32 as grid_tree returns them; any strides. y (B, L, D) contiguous:
//     delta = softplus(dt dt_weight^T + dt_bias);  decay = exp(-exp(A_log) delta)
//     h     = tree_scan(delta b x, decay, parent, order, propagation)
//     y     = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate)
//   16-bit values are computed in float32.
// tree_selective_scan_backward(grad_y, ... the same ...) -> the gradients of the 13 floating inputs, in their order
//   Nothing but the inputs is needed: decay, input and h are computed again.
#pragma once

#include <ATen/core/Tensor.h>

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
};

inline void check_selective_scan_inputs(
    const SelectiveScanInputs& in, const at::Tensor& parent, const at::Tensor& order) {
  // Rank, and that parent and order belong to x.
  check_scan_inputs(in.x, in.x, parent, order);
  const int64_t batch = in.x.size(0), vertices = in.x.size(1), channels = in.x.size(2);
  const int64_t rank = in.dt_weight.dim() == 2 ? in.dt_weight.size(1) : -1;
  const auto check = [&](const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(
        tensor.scalar_type() == in.x.scalar_type(),
        name,
        " must have the dtype of x ",
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
  check("dt_weight", in.dt_weight, {channels, rank});
  check("dt", in.dt, {batch, vertices, rank});
  check("b", in.b, {batch, vertices, 1});
  check("c", in.c, {batch, vertices, 1});
  check("gate", in.gate, {batch, vertices, channels});
  check("dt_bias", in.dt_bias, {channels});
  check("A_log", in.A_log, {channels});
  check("Ds", in.Ds, {channels});
  check("h_norm_weight", in.h_norm_weight, {channels});
  check("h_norm_bias", in.h_norm_bias, {channels});
  check("out_norm_weight", in.out_norm_weight, {channels});
  check("out_norm_bias", in.out_norm_bias, {channels});
}

}  // namespace grootvl
