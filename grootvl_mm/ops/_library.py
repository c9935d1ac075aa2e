"""Loads the compiled operators and registers their fake kernels, gradients, autocast rules and FLOP formulas.

The extension ``grootvl_mm/_C*.so`` defines ``torch.ops.grootvl.*`` with CPU and, if built for it, CUDA kernels. If it
is missing, or an operator has no kernel for a device, the reference implementation of the same name is used; operators
in ``THROUGH_HOST`` run their CPU kernels for CUDA tensors. ``GROOTVL_LIBRARY=FILE`` loads another build of the
extension.
"""

import os
import warnings
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grootvl_mm.ops import reference, reference_neighbours
from grootvl_mm.ops._compat import (
    implement_autocast,
    infer_schema,
    register_autograd,
    register_fake,
    register_flop_formula,
)

NAMESPACE = "grootvl"
REFERENCES: dict[str, Callable] = {
    function.__name__: function
    for function in (
        reference.grid_edge_weight,
        reference.grid_tree,
        reference.graph_tree,
        reference.tree_scan,
        reference.tree_scan_backward,
        reference.tree_selective_scan,
        reference.tree_selective_scan_backward,
        reference_neighbours.layer_norm,
        reference_neighbours.residual_layer_norm,
        reference_neighbours.layer_norm_backward,
        reference_neighbours.depthwise_conv_silu,
        reference_neighbours.depthwise_conv_silu_backward,
    )
}

# Private operators of devices whose scans use cuts, and their schemas.
CUTS = {
    "tree_cut": "(Tensor parent, Tensor order) -> Tensor",
    "grid_tree_and_cut": "(Tensor edge_weight, SymInt height, SymInt width, SymInt root) -> (Tensor, Tensor, Tensor)",
}

# Operators without CUDA kernels, for which copying to the host is faster than the reference on the GPU.
THROUGH_HOST = frozenset({"graph_tree"})


def extension_error() -> str | None:
    """Why the compiled operators are not in use, or None when they are."""
    return _EXTENSION_ERROR


def has_kernels(device_type: str) -> bool:
    """Whether the compiled operators have kernels for a device type, such as ``cuda``."""
    return device_type in _KERNELS


def _load_extension() -> str | None:
    folder = Path(__file__).resolve().parent.parent
    libraries = sorted(path for suffix in ("so", "pyd") for path in folder.glob(f"_C*.{suffix}"))
    if "GROOTVL_LIBRARY" in os.environ:
        libraries = [Path(os.environ["GROOTVL_LIBRARY"])]
    if not libraries:
        return f"no compiled library in {folder}"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load with torch {torch.__version__}: {error}"
    missing = [name for name in (*REFERENCES, *CUTS) if not hasattr(getattr(torch.ops, NAMESPACE), name)]
    if missing:
        raise ImportError(
            f"{libraries[0]} was compiled from other sources: it has no {', '.join(missing)}. Recompile it: "
            "pip install --no-build-isolation CHECKOUT"
        )
    return None


def _has_kernel(name: str, device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device_type.upper())


def _through_host(name: str) -> Callable:
    """A kernel that copies its inputs to the CPU, runs the operator there and copies the results back."""

    def kernel(*inputs: Any) -> tuple[Tensor, ...]:
        device = next(value.device for value in inputs if isinstance(value, Tensor))
        on_host = (value.cpu() if isinstance(value, Tensor) else value for value in inputs)
        return tuple(result.to(device) for result in _operator(name)(*on_host))

    return kernel


def _install_references(library: torch.library.Library) -> None:
    """Register the reference, or the CPU kernel, for every operator and device without a compiled kernel."""
    for name, function in REFERENCES.items():
        if _EXTENSION_ERROR is not None:
            library.define(name + infer_schema(function, mutates_args=()))
            library.impl(name, function, "CompositeExplicitAutograd")
            continue
        for device_type in ("cpu", "cuda"):
            if not _has_kernel(name, device_type):
                goes_to_host = device_type == "cuda" and name in THROUGH_HOST
                library.impl(name, _through_host(name) if goes_to_host else function, device_type.upper())
    if _EXTENSION_ERROR is not None:
        for name, schema in CUTS.items():
            library.define(name + schema)


def _find_kernels() -> frozenset[str]:
    if _EXTENSION_ERROR is not None:
        return frozenset()
    return frozenset(device_type for device_type in ("cpu", "cuda") if _has_kernel("tree_scan", device_type))


_EXTENSION_ERROR = _load_extension()
_KERNELS = _find_kernels()
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_install_references(_LIBRARY)
if _EXTENSION_ERROR is not None:
    warnings.warn(
        f"grootvl_mm runs on its slow PyTorch operators: {_EXTENSION_ERROR}. "
        "Reinstall it with a C++ compiler available: pip install --no-build-isolation CHECKOUT",
        stacklevel=2,
    )


def _operator(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@register_fake(f"{NAMESPACE}::grid_edge_weight")
def _(feature: Tensor, metric: str, log: bool) -> Tensor:
    batch, _, height, width = feature.shape
    num_edges = (height - 1) * width + height * (width - 1)
    return feature.new_empty((batch, num_edges), dtype=torch.float32)


@register_fake(f"{NAMESPACE}::grid_tree")
def _(edge_weight: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor]:
    shape = (edge_weight.shape[0], height * width)
    parent = edge_weight.new_empty(shape, dtype=torch.int32)
    return parent, torch.empty_like(parent)


@register_fake(f"{NAMESPACE}::grid_tree_and_cut")
def _(edge_weight: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor, Tensor]:
    parent, order = _operator("grid_tree")(edge_weight, height, width, root)
    return parent, order, _operator("tree_cut")(parent, order)


@register_fake(f"{NAMESPACE}::graph_tree")
def _(edge_index: Tensor, edge_weight: Tensor, num_vertices: int, root: Tensor) -> tuple[Tensor, Tensor]:
    parent = edge_weight.new_empty((edge_weight.shape[0], num_vertices), dtype=torch.int32)
    return parent, torch.empty_like(parent)


# Device types whose scans use cuts, the results of the operator tree_cut.
CUTTING_DEVICES = frozenset(device_type for device_type in ("cpu", "cuda") if _has_kernel("tree_cut", device_type))


@register_fake(f"{NAMESPACE}::tree_cut")
def _(parent: Tensor, order: Tensor) -> Tensor:
    return parent.new_empty((parent.shape[0], 7 * parent.shape[1] + 8))


@register_fake(f"{NAMESPACE}::tree_scan")
def _(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, propagation: str, cut: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake(f"{NAMESPACE}::tree_scan_backward")
def _(grad_h: Tensor, x: Tensor, decay: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(decay, memory_format=torch.contiguous_format),
    )


@register_fake(f"{NAMESPACE}::tree_selective_scan")
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake(f"{NAMESPACE}::tree_selective_scan_backward")
def _(grad_y: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = args[: len(reference.SelectiveScanInputs._fields)]
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in inputs)


def _no_gradient(name: str) -> None:
    """Mark an operator as not differentiable: building a tree is a discrete choice."""

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.num_inputs = len(inputs)
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return (None,) * ctx.num_inputs

    register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)


for _name in ("grid_edge_weight", "grid_tree", "grid_tree_and_cut", "graph_tree", "tree_cut"):
    _no_gradient(_name)


def _save_scan(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.propagation, cut = reference.with_cut(inputs)
    ctx.save_for_backward(*tensors, cut)


def _scan_backward(ctx: Any, grad_h: Tensor) -> tuple:
    *tensors, cut = ctx.saved_tensors
    grads = _operator("tree_scan_backward")(grad_h, *tensors, ctx.propagation, cut)
    return (*grads, None, None, None, None)


def _scan_double_backward(ctx: Any, *grad_grads: Tensor) -> tuple:
    """Double backward through the backward formula, in which the scans are differentiable operators."""
    *differentiable, parent, order, cut = ctx.saved_tensors

    def backward(grad_h: Tensor, x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        def scan(value: Tensor, direction: str) -> Tensor:
            return _operator("tree_scan")(value, decay, parent, order, direction, cut)

        return reference.scan_backward(scan, grad_h, x, decay, parent, ctx.propagation)

    return (*reference.vjp(backward, differentiable, grad_grads), None, None, None, None)


register_autograd(f"{NAMESPACE}::tree_scan", _scan_backward, setup_context=_save_scan)
register_autograd(f"{NAMESPACE}::tree_scan_backward", _scan_double_backward, setup_context=_save_scan)


def _save_selective_scan(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.eps, ctx.propagation, cut = reference.with_cut(inputs)
    ctx.save_for_backward(*tensors, cut)


def _selective_scan_backward(ctx: Any, grad_y: Tensor) -> tuple:
    *tensors, cut = ctx.saved_tensors
    grads = _operator("tree_selective_scan_backward")(grad_y, *tensors, ctx.eps, ctx.propagation, cut)
    return (*grads, None, None, None, None, None)


def _selective_scan_double_backward(ctx: Any, *grad_grads: Tensor) -> tuple:
    """Double backward through the same computation in PyTorch operators and ``tree_scan``."""
    *differentiable, parent, order, cut = ctx.saved_tensors

    def backward(grad_y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        wide = [reference.accumulated(value) for value in inputs]
        grad_y = reference.accumulated(grad_y)
        grads = reference.selective_scan_backward(grad_y, wide, parent, order, ctx.eps, ctx.propagation, cut)
        return tuple(grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=True))

    return (*reference.vjp(backward, differentiable, grad_grads), None, None, None, None, None)


register_autograd(f"{NAMESPACE}::tree_selective_scan", _selective_scan_backward, setup_context=_save_selective_scan)
register_autograd(
    f"{NAMESPACE}::tree_selective_scan_backward", _selective_scan_double_backward, setup_context=_save_selective_scan
)


def _autocast_scan(autocast: torch.dtype, x: Tensor, decay: Tensor, *rest: Any) -> tuple:
    """Cast to the wider dtype of the two: 16-bit inputs need no cast, since they are accumulated in float32."""
    dtype = torch.promote_types(x.dtype, decay.dtype)
    return x.to(dtype), decay.to(dtype), *rest


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else value.to(dtype)


def _autocast_selective_scan(autocast: torch.dtype, *inputs: Any) -> tuple:
    """Cast activations to the widest dtype among them, and parameters, which are small, to at least float32."""
    values = reference.SelectiveScanInputs(*inputs[: len(reference.SelectiveScanInputs._fields)])
    dtype = reduce(torch.promote_types, (value.dtype for value in values.activations()))
    wide = torch.promote_types(dtype, torch.float32)
    activations = (_cast(value, dtype) for value in values.activations())
    parameters = (_cast(value, wide) for value in values.parameters())
    return *activations, *parameters, *inputs[len(values) :]


for _device_type in ("cpu", "cuda"):
    implement_autocast(f"{NAMESPACE}::tree_scan", _device_type, _autocast_scan)
    implement_autocast(f"{NAMESPACE}::tree_selective_scan", _device_type, _autocast_selective_scan)


# FLOPs per element of x; a multiply-add counts as two. Building a tree counts as none: it only compares.
_SCAN_FLOPS = {"up": 2, "down": 2, "all": 6}
_SCAN_BACKWARD_FLOPS = {"up": 5, "down": 5, "all": 15}
_WEIGHT_FLOPS = {"cosine": 6, "euclidean": 6, "manhattan": 4}


def _propagation(args: tuple) -> str:
    """The propagation among the arguments of a scan: the only string."""
    return next(value for value in args if isinstance(value, str))


@register_flop_formula(torch.ops.grootvl.grid_edge_weight)
def _(feature_shape: torch.Size, metric: str, log: bool, **kwargs: Any) -> int:
    return _WEIGHT_FLOPS[metric] * feature_shape.numel()


for _name in ("grid_tree", "grid_tree_and_cut", "graph_tree", "tree_cut"):
    register_flop_formula(getattr(torch.ops.grootvl, _name))(lambda *args, **kwargs: 0)


@register_flop_formula(torch.ops.grootvl.tree_scan)
def _(x_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _SCAN_FLOPS[_propagation(args)] * x_shape.numel()


@register_flop_formula(torch.ops.grootvl.tree_scan_backward)
def _(x_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _SCAN_BACKWARD_FLOPS[_propagation(args)] * x_shape.numel()


# Without scan and projection of dt: softplus 2, decay 2, scan input 2, layer norms 7 each, skip connection 3, gate 4.
_SELECTIVE_FLOPS = 27


@register_flop_formula(torch.ops.grootvl.tree_selective_scan)
def _(x_shape: torch.Size, dt_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return (_SCAN_FLOPS[_propagation(args)] + 2 * dt_shape[-1] + _SELECTIVE_FLOPS) * x_shape.numel()


@register_flop_formula(torch.ops.grootvl.tree_selective_scan_backward)
def _(grad_y_shape: torch.Size, x_shape: torch.Size, dt_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return (_SCAN_BACKWARD_FLOPS[_propagation(args)] + 6 * dt_shape[-1] + 2 * _SELECTIVE_FLOPS) * x_shape.numel()
