// The schemas of all operators. Kernels are registered where they are implemented, gradients in autograd.cpp; fake
// kernels, double backward and autocast in grootvl_mm/ops/_library.py and _neighbours.py.
#include <torch/library.h>

TORCH_LIBRARY(grootvl, m) {
  m.def("grid_edge_weight(Tensor feature, str metric, bool log) -> Tensor");
  m.def("grid_tree(Tensor edge_weight, SymInt height, SymInt width, SymInt root) -> (Tensor, Tensor)");
  m.def("graph_tree(Tensor edge_index, Tensor edge_weight, SymInt num_vertices, Tensor root) -> (Tensor, Tensor)");
  m.def("grid_tree_and_cut(Tensor edge_weight, SymInt height, SymInt width, SymInt root) -> (Tensor, Tensor, Tensor)");
  m.def("tree_cut(Tensor parent, Tensor order) -> Tensor");
  m.def("tree_scan(Tensor x, Tensor decay, Tensor parent, Tensor order, str propagation, Tensor? cut=None) -> Tensor");
  m.def(
      "tree_scan_backward(Tensor grad_h, Tensor x, Tensor decay, Tensor parent, Tensor order, str propagation, "
      "Tensor? cut=None) -> (Tensor, Tensor)");
  m.def(
      "tree_selective_scan(Tensor x, Tensor dt, Tensor b, Tensor c, Tensor gate, Tensor dt_weight, Tensor dt_bias, "
      "Tensor A_log, Tensor Ds, Tensor h_norm_weight, Tensor h_norm_bias, Tensor out_norm_weight, "
      "Tensor out_norm_bias, Tensor parent, Tensor order, float eps, str propagation, Tensor? cut=None) -> Tensor");
  m.def(
      "tree_selective_scan_backward(Tensor grad_y, Tensor x, Tensor dt, Tensor b, Tensor c, Tensor gate, "
      "Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor Ds, Tensor h_norm_weight, Tensor h_norm_bias, "
      "Tensor out_norm_weight, Tensor out_norm_bias, Tensor parent, Tensor order, float eps, str propagation, "
      "Tensor? cut=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType? dtype) -> Tensor");
  m.def(
      "residual_layer_norm(Tensor x, Tensor branch, Tensor? factor, Tensor weight, Tensor bias, float eps, "
      "ScalarType? dtype) -> (Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor value, Tensor? factor, Tensor weight, "
      "float eps, ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("depthwise_conv_silu(Tensor x, Tensor weight) -> Tensor");
  m.def("depthwise_conv_silu_backward(Tensor grad_y, Tensor x, Tensor weight) -> (Tensor, Tensor)");
}
