// Gradients of the operators. Formulas of double backward, and all gradients where the operators are not compiled or
// torch.func transforms them, are in grootvl_mm/ops/_library.py and _neighbours.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checks.h"

namespace grootvl {
namespace {

using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;
using OptionalDtype = c10::optional<at::ScalarType>;

OperatorHandle find_operator(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("grootvl::" + name).c_str(), "");
}

// Runs an operator of a backward pass, which is differentiable only if it records another graph.
template <typename Call>
auto in_backward(const Call& call) {
  if (at::GradMode::is_enabled()) {
    return call();
  }
  const at::AutoDispatchBelowAutograd guard;
  return call();
}

template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

// Operators without gradients: building a tree is a discrete choice.
void call_below_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// An operator with one result whose gradients are those of the operator NAME_backward(gradient, inputs...). Saves all
// inputs; the first ones get gradients.
template <typename Name>
struct Recomputing : torch::autograd::Function<Recomputing<Name>> {
  static constexpr bool is_traceable = true;

  static void call(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    std::vector<at::Tensor> tensors;
    bool requires_grad = false;
    for (const c10::IValue& input : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (input.isTensor() && input.toTensor().defined()) {
        tensors.push_back(input.toTensor());
        requires_grad |= tensors.back().requires_grad();
      }
    }
    if (!requires_grad || !at::GradMode::is_enabled()) {
      return call_below_autograd(op, keys, stack);
    }
    torch::jit::push(*stack, Recomputing::apply(at::TensorList(tensors), op, keys, stack));
  }

  static at::Tensor forward(
      AutogradContext* ctx, at::TensorList tensors, const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    ctx->save_for_backward(tensors.vec());
    c10::impl::GenericList others(c10::AnyType::get());
    std::vector<int64_t> places;  // of the tensors among the inputs
    const auto inputs = torch::jit::last(*stack, op.schema().arguments().size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].isTensor() && inputs[i].toTensor().defined()) {
        places.push_back(static_cast<int64_t>(i));
      } else {
        others.push_back(inputs[i]);
      }
    }
    ctx->saved_data["others"] = std::move(others);
    ctx->saved_data["places"] = std::move(places);
    call_below_autograd(op, keys, stack);
    return torch::jit::pop(*stack).toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const OperatorHandle op = find_operator(std::string(Name::value) + "_backward");
    const variable_list tensors = ctx->get_saved_variables();
    const auto others = ctx->saved_data["others"].toList();
    const auto places = ctx->saved_data["places"].toIntVector();
    Stack stack{grads[0]};
    for (size_t tensor = 0, other = 0; tensor + other < tensors.size() + others.size();) {
      if (tensor < places.size() && places[tensor] == static_cast<int64_t>(tensor + other)) {
        stack.emplace_back(tensors[tensor++]);
      } else {
        stack.emplace_back(others.get(other++));
      }
    }
    in_backward([&] { op.callBoxed(stack); });
    variable_list results(tensors.size() + 3);  // and the arguments of forward that are not tensors
    for (size_t i = 0; i < stack.size(); ++i) {
      results[i] = stack[i].toTensor();
    }
    return results;
  }
};

struct TreeScan {
  static constexpr auto value = "tree_scan";
};

struct TreeSelectiveScan {
  static constexpr auto value = "tree_selective_scan";
};

struct DepthwiseConvSilu {
  static constexpr auto value = "depthwise_conv_silu";
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const OptionalTensor& grad_sum,
    const at::Tensor& grad_normed,
    const at::Tensor& value,
    const OptionalTensor& factor,
    const at::Tensor& weight,
    double eps,
    OptionalDtype branch_dtype) {
  static const auto op = find_operator("layer_norm_backward").typed<decltype(layer_norm_backward)>();
  return in_backward([&] { return op.call(grad_sum, grad_normed, value, factor, weight, eps, branch_dtype); });
}

at::Tensor plain_layer_norm(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, OptionalDtype dtype) {
  static const auto op = find_operator("layer_norm").typed<decltype(plain_layer_norm)>();
  const at::AutoDispatchBelowAutograd guard;
  return op.call(x, weight, bias, eps, dtype);
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static constexpr bool is_traceable = true;

  static at::Tensor call(
      const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, OptionalDtype dtype) {
    if (needs_gradient(x, weight, bias)) {
      return apply(x, weight, bias, eps, dtype);
    }
    return plain_layer_norm(x, weight, bias, eps, dtype);
  }

  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& x,
      const at::Tensor& weight,
      const at::Tensor& bias,
      double eps,
      OptionalDtype dtype) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["eps"] = eps;
    return plain_layer_norm(x, weight, bias, eps, dtype);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto [of_x, of_branch, of_weight, of_bias] = layer_norm_backward(
        c10::nullopt, grads[0], saved[0], c10::nullopt, saved[1], ctx->saved_data["eps"].toDouble(), c10::nullopt);
    return {of_x, of_weight, of_bias, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor> plain_residual_layer_norm(
    const at::Tensor& x,
    const at::Tensor& branch,
    const OptionalTensor& factor,
    const at::Tensor& weight,
    const at::Tensor& bias,
    double eps,
    OptionalDtype dtype) {
  static const auto op = find_operator("residual_layer_norm").typed<decltype(plain_residual_layer_norm)>();
  const at::AutoDispatchBelowAutograd guard;
  return op.call(x, branch, factor, weight, bias, eps, dtype);
}

struct ResidualLayerNorm : torch::autograd::Function<ResidualLayerNorm> {
  static constexpr bool is_traceable = true;

  static std::tuple<at::Tensor, at::Tensor> call(
      const at::Tensor& x,
      const at::Tensor& branch,
      const OptionalTensor& factor,
      const at::Tensor& weight,
      const at::Tensor& bias,
      double eps,
      OptionalDtype dtype) {
    if (!needs_gradient(x, branch, weight, bias)) {
      return plain_residual_layer_norm(x, branch, factor, weight, bias, eps, dtype);
    }
    const variable_list results = apply(x, branch, factor, weight, bias, eps, dtype);
    return {results[0], results[1]};
  }

  static variable_list forward(
      AutogradContext* ctx,
      const at::Tensor& x,
      const at::Tensor& branch,
      const OptionalTensor& factor,
      const at::Tensor& weight,
      const at::Tensor& bias,
      double eps,
      OptionalDtype dtype) {
    const auto [sum, normed] = plain_residual_layer_norm(x, branch, factor, weight, bias, eps, dtype);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({sum, factor.value_or(at::Tensor()), weight});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["normed_dtype"] = normed.scalar_type();
    // Without a cast or a factor, the gradient of the branch is that of x.
    if (branch.scalar_type() != x.scalar_type() || factor.has_value()) {
      ctx->saved_data["branch_dtype"] = branch.scalar_type();
    }
    return {sum, normed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? OptionalTensor(tensor) : c10::nullopt;
    };
    const auto found = ctx->saved_data.find("branch_dtype");
    const OptionalDtype branch_dtype =
        found == ctx->saved_data.end() ? OptionalDtype() : OptionalDtype(found->second.toScalarType());
    const at::Tensor& sum = saved[0];
    const at::Tensor grad_normed =
        grads[1].defined() ? grads[1] : at::zeros_like(sum, ctx->saved_data["normed_dtype"].toScalarType());
    const auto [of_x, of_branch, of_weight, of_bias] = layer_norm_backward(
        optional(grads[0]),
        grad_normed,
        sum,
        optional(saved[1]),
        saved[2],
        ctx->saved_data["eps"].toDouble(),
        branch_dtype);
    return {of_x, branch_dtype.has_value() ? of_branch : of_x, {}, of_weight, of_bias, {}, {}};
  }
};

TORCH_LIBRARY_IMPL(grootvl, Autograd, m) {
  for (const char* name : {"grid_edge_weight", "grid_tree", "grid_tree_and_cut", "graph_tree", "tree_cut"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&call_below_autograd>());
  }
  m.impl(TreeScan::value, torch::CppFunction::makeFromBoxedFunction<&Recomputing<TreeScan>::call>());
  m.impl(TreeSelectiveScan::value, torch::CppFunction::makeFromBoxedFunction<&Recomputing<TreeSelectiveScan>::call>());
  m.impl(DepthwiseConvSilu::value, torch::CppFunction::makeFromBoxedFunction<&Recomputing<DepthwiseConvSilu>::call>());
  m.impl("layer_norm", LayerNorm::call);
  m.impl("residual_layer_norm", ResidualLayerNorm::call);
}

}  // namespace
}  // namespace grootvl
