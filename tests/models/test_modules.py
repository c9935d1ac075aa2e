"""Every module of the tree is called, or stands for what its forward would do, whatever is done to it.

The tools that people use on models are written here as they work: an adapter is a module in a layer's place or a child
of it, a counter is a forward hook, a pruned weight is computed by a pre-hook.
"""

import contextlib
import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.layers.recompute import lean
from grootvl_mm.models import GrootV, TreeSSM, grootv
from tests.helpers.marks import needs_compiler
from tests.helpers.memory import kept_tensors

LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2")
NORMS = ("norm1", "norm2", "h_norm", "out_norm")
LEAVES = (*LINEAR, *NORMS, "conv2d", "act")


def make(**options) -> GrootV:
    """A model in which every weight matters."""
    model = GrootV(**{"arch": {"channels": 8, "depths": [1, 1]}, "out_indices": (1,)} | options)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "stem" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def layers(model: nn.Module, name: str) -> list[tuple[nn.Module, nn.Module]]:
    """Parents and the modules of one name in the blocks."""
    return [
        (model.get_submodule(path.rpartition(".")[0]), module)
        for path, module in model.named_modules()
        if path.endswith(f".{name}") and "blocks" in path
    ]


def both_modes(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The map with and without gradients, which must be the same."""
    maps = []
    for watched in (True, False):
        with torch.set_grad_enabled(watched):
            maps.append(model(image)[-1].detach())
    torch.testing.assert_close(*maps, rtol=1e-5, atol=1e-5)
    return maps[0]


class Adapted(nn.Module):
    """A layer and a low-rank update of it, as LoRA adds them; without attributes of the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result and the update."""
        return self.layer(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        """The layer with the update in its weights."""
        merged = copy.deepcopy(self.layer)
        merged.weight.data += self.up.weight.data @ self.down.weight.data
        return merged


@pytest.mark.parametrize("name", LINEAR)
def test_adapters(device: torch.device, name: str) -> None:
    model, image = make().to(device), torch.randn(2, 3, 48, 40, device=device)
    for parent, layer in layers(model, name):
        setattr(parent, name, Adapted(layer).to(device))
    model(image)[-1].square().mean().backward()
    adapters = [layer for _, layer in layers(model, name)]
    assert all(adapter.up.weight.grad.any() and adapter.down.weight.grad.any() for adapter in adapters)
    adapted = both_modes(model, image)
    for parent, adapter in layers(model, name):
        setattr(parent, name, adapter.merged())
    torch.testing.assert_close(adapted, both_modes(model, image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LEAVES)
def test_hooks_are_called_once_and_have_the_last_word(name: str) -> None:
    """Forward hooks and pre-hooks in both modes, backward hooks in the one that has gradients."""
    model, image = make(), torch.randn(1, 3, 40, 48)
    plain = both_modes(model, image)
    calls = []
    handles = []
    for _, module in layers(model, name):
        handles.append(module.register_forward_pre_hook(lambda module, args: calls.append("pre")))
        handles.append(module.register_forward_hook(lambda module, args, output: calls.append("forward")))
        handles.append(module.register_full_backward_hook(lambda module, *grads: calls.append("backward")))
    torch.testing.assert_close(both_modes(model, image), plain, rtol=1e-4, atol=1e-5)
    assert sorted(calls) == ["forward"] * 4 + ["pre"] * 4
    model(image)[-1].square().mean().backward()
    assert calls.count("backward") == 2
    for handle in handles:
        handle.remove()
    for _, module in layers(model, name):
        module.register_forward_hook(lambda module, args, output: output * 0.5 + 0.1)
    assert not torch.allclose(both_modes(model, image), plain, rtol=1e-3)


@needs_compiler
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("watched", [True, False], ids=["gradients", "no gradients"])
def test_blocks_with_and_without_hooks_are_the_same(
    device: torch.device, watched: bool, is_autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without hooks, the functions of their modules are called directly; values, gradients and memory are the same."""
    model, image = make(drop_path_rate=0.2, ignore_padding=True).to(device), torch.randn(2, 3, 40, 48, device=device)
    image[0, :, 30:] = 0
    directly = []
    monkeypatch.setattr(grootv, "lean", lambda *args: _spied(lean(*args), directly))

    def run() -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_autocast)
        with torch.set_grad_enabled(watched), kept_tensors() as kept, precision:
            feature = model(image)[-1]
        grads = torch.autograd.grad(feature.square().sum(), list(model.parameters())) if watched else ()
        return [feature, *grads], sum(value.untyped_storage().nbytes() for value in kept.values())

    plain = run()
    for parent, _ in layers(model, "mlp"):
        parent.mixer.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(run(), plain, rtol=0, atol=0)
    assert directly == [True, True, False, False]


def _spied(context: contextlib.AbstractContextManager, directly: list[bool]) -> contextlib.AbstractContextManager:
    directly.append(context.is_direct)
    return context


@pytest.mark.parametrize("name", NORMS)
def test_activations_and_gradients_of_norms(name: str) -> None:
    """What Grad-CAM reads: they are those of the map that the model returned."""
    model, image = make().double(), torch.randn(1, 3, 40, 48, dtype=torch.float64)
    kept = []
    for _, module in layers(model, name):
        module.register_forward_hook(lambda module, args, output: kept.append(output))
    direction = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    loss = (model(image)[-1] * direction).sum()
    grads = torch.autograd.grad(loss, kept)
    assert all(grad.any() for grad in grads)
    step = 1e-4 * grads[0] / grads[0].norm()
    values = iter((kept[0].detach() + step,))
    layers(model, name)[0][1].register_forward_hook(lambda *args: next(values))
    with torch.no_grad():
        moved = (model(image)[-1] * direction).sum()
    assert (moved - loss).item() == pytest.approx((step * grads[0]).sum().item(), rel=0.01)


def circular(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution that makes textures tile."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, groups=conv.groups)


def test_methods_set_on_instances() -> None:
    """Those that a call of a module runs beside ``forward``."""
    model, image = make(), torch.randn(1, 3, 32, 40)
    plain = both_modes(model, image)
    replaced = copy.deepcopy(model)
    for parent, conv in layers(replaced, "conv2d"):
        options = {"padding": 1, "groups": conv.groups, "bias": False, "padding_mode": "circular"}
        parent.conv2d = nn.Conv2d(conv.in_channels, conv.out_channels, 3, **options)
        parent.conv2d.weight = conv.weight
    for _, conv in layers(model, "conv2d"):
        conv._conv_forward = types.MethodType(circular, conv)
    tiled = both_modes(model, image)
    torch.testing.assert_close(tiled, both_modes(replaced, image))
    assert not torch.allclose(tiled, plain, rtol=1e-3)


def test_trees_of_a_teacher() -> None:
    """A method set on a mixer calls another model, whose hooks are called as well."""
    model, teacher, image, calls = make(), make(), torch.randn(1, 3, 32, 40), []
    for _, layer in layers(teacher, "x_proj"):
        layer.register_forward_hook(lambda *args: calls.append("x_proj"))
    teachers = {mixer.in_proj.in_features: mixer for _, mixer in layers(teacher, "mixer")}
    for _, mixer in layers(model, "mixer"):

        def build_tree(feature: Tensor, padding: None, mixer: TreeSSM = mixer) -> object:
            batch, _, height, width = feature.shape
            channels = mixer.in_proj.in_features
            return teachers[channels](torch.ones(batch, height, width, channels))[1]

        mixer.build_tree = build_tree
    both_modes(model, image)
    assert len(calls) == 4


class ByKeywords(nn.Conv2d):
    """A convolution that names the arguments of the function."""

    def forward(self, x: Tensor) -> Tensor:
        """As its class."""
        return F.conv2d(input=x, weight=self.weight, padding=1, groups=self.groups)


class Learning(nn.Linear):
    """A layer that takes a step on its weights before it is applied, as in test-time training."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer after the step."""
        step = torch.func.grad(lambda weight: F.gelu(F.linear(x, weight)).square().mean())(self.weight)
        return F.linear(x, self.weight - 0.1 * step, self.bias)


class Tangent(nn.Linear):
    """A layer that differentiates in forward mode."""

    def forward(self, x: Tensor) -> Tensor:
        """The derivative along the ones."""
        return torch.func.jvp(super().forward, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize(("name", "kind"), [("conv2d", ByKeywords), ("fc2", Learning), ("fc2", Tangent)])
def test_what_foreign_modules_do_with_functions(name: str, kind: type[nn.Module]) -> None:
    model, image = make(), torch.randn(1, 3, 32, 40)
    for _, module in layers(model, name):
        module.__class__ = kind
    leaves, results = [p for name, p in model.named_parameters() if "fc2.bias" not in name], []
    for is_plain in (False, True):
        with BaseTorchFunctionMode() if is_plain else contextlib.nullcontext():  # PyTorch's defaults apply
            feature = model(image)[-1]
        results.append([both_modes(model, image), feature, *torch.autograd.grad(feature.square().mean(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


TOUCHES: dict[str, Callable[[nn.Module], object]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hooks": torch.nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "weight norm by hooks": torch.nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", [*LINEAR, "conv2d"])
@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_weights_that_are_computed(touch: Callable, name: str) -> None:
    """After a step, the next call takes the new ones, in either mode; and their parameters get the gradients."""
    model, image = make().train(), torch.randn(1, 3, 32, 40)
    for _, layer in layers(model, name):
        touch(layer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(image)[-1].square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    model.eval()
    after = both_modes(model, image)
    fresh = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(image)[-1], after)
    model.load_state_dict(fresh)
    torch.testing.assert_close(both_modes(model, image), after)


class Scaled(nn.LayerNorm):
    """A norm that does more than its class's."""

    def forward(self, x: Tensor) -> Tensor:
        """Three times the norm."""
        return 3 * super().forward(x)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "norm",
    [Scaled, lambda channels: nn.Identity(), lambda channels: nn.LayerNorm(channels, eps=1.0), nn.RMSNorm]
    if hasattr(nn, "RMSNorm")
    else [Scaled],
)
def test_replaced_norms(norm: Callable, name: str) -> None:
    model, image = make(), torch.randn(1, 3, 32, 40)
    nn.init.normal_(model.stem.norm2.bias)  # without a mean in what it reads, RMSNorm is LayerNorm
    plain = both_modes(model, image)
    for parent, module in layers(model, name):
        setattr(parent, name, norm(module.normalized_shape[0]))
    other = both_modes(model, image)
    assert not torch.allclose(plain, other, rtol=1e-3)
    model(image)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Int8(Tensor):
    """A weight that is kept in 8 bits, as weight-only quantization does it: operators see it dequantized."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    @staticmethod
    def __new__(cls, values: Tensor) -> "Int8":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor) -> None:
        self.scale = values.abs().amax() / 127
        self.values = (values / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is torch.ops.aten.detach.default:
            return args[0]
        args = torch.utils._pytree.tree_map_only(cls, lambda weight: weight.values * weight.scale, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LINEAR)
def test_weight_only_quantization(name: str) -> None:
    model, image = make().requires_grad_(False), torch.randn(1, 3, 32, 40)
    rounded = copy.deepcopy(model)
    for (_, layer), (_, other) in zip(layers(model, name), layers(rounded, name), strict=True):
        weight = Int8(layer.weight.detach())
        layer.weight = nn.Parameter(weight, requires_grad=False)
        other.weight.copy_(weight.values * weight.scale)
    torch.testing.assert_close(both_modes(model, image), both_modes(rounded, image), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", LINEAR)
def test_sparse_weights(name: str) -> None:
    model, image = make().requires_grad_(False), torch.randn(1, 3, 32, 40)
    expected = both_modes(model, image)
    for _, layer in layers(model, name):
        layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(both_modes(model, image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization() -> None:
    model, image = make().eval(), torch.randn(1, 3, 32, 40)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    replaced = [type(layer).__module__ for name in LINEAR if name != "dt_proj" for _, layer in layers(quantized, name)]
    assert all("quantized" in module for module in replaced)
    quantized.load_state_dict(copy.deepcopy(quantized).state_dict())
    assert (both_modes(quantized, image) - both_modes(model, image)).norm() < 0.1 * model(image)[-1].norm()


def test_counter_of_pytorch_has_a_row_for_each_module() -> None:
    model, image = make(), torch.randn(1, 3, 32, 40)
    with FlopCounterMode(model, display=False) as counter:  # newer versions need no model
        model(image)[-1].sum().backward()
    rows = {name.rpartition(".")[2] for name in counter.get_flop_counts()}
    assert rows >= {"in_proj", "conv2d", "x_proj", "out_proj", "fc1", "fc2"}  # the scan's are in that of the mixer


def test_counting_by_hooks_on_types() -> None:
    """As thop does: within 10 % of PyTorch's own counter."""
    model, image = GrootV("pico").eval(), torch.randn(1, 3, 64, 64)
    counts = []

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        per_output = {nn.Linear: lambda: module.in_features, nn.Conv2d: lambda: module.weight[0].numel()}
        counts.append(2 * output.numel() * per_output.get(type(module), lambda: 0)())

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    model.apply(lambda module: module.register_forward_hook(count) if not list(module.children()) else None)
    with torch.no_grad():
        model(image)
    assert sum(counts) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("watched", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", nn.Linear), ("conv2d", nn.Conv2d), ("layer_norm", nn.LayerNorm), ("gelu", nn.GELU), ("silu", TreeSSM)],
)
def test_replaced_functions(name: str, kind: type, watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's profiler and ptflops replace them: each is called as often as the modules that use it."""
    model, image, function, calls = make(), torch.randn(1, 3, 32, 40), getattr(F, name), []

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(name)
        return function(*args, **kwargs)

    expected = model(image)[-1]
    monkeypatch.setattr(F, name, counted)
    with torch.set_grad_enabled(watched):
        torch.testing.assert_close(model(image)[-1], expected, rtol=1e-4, atol=1e-4)
    uses = 2 if kind is TreeSSM else 1
    assert len(calls) == uses * sum(isinstance(module, kind) for module in model.modules())


def test_per_sample_gradients_by_hooks() -> None:
    """As Opacus computes them, from what hooks see: those of each sample alone."""
    model, image = make(), torch.randn(3, 3, 32, 40)
    leaves = {name: module for name, module in model.named_modules() if not module._modules and module._parameters}
    plain, inputs, samples = copy.deepcopy(model), {}, {}

    def compute(name: str, gradient: Tensor) -> None:
        layer = plain.get_submodule(name)

        def loss(parameters: dict[str, Tensor], value: Tensor, gradient: Tensor) -> Tensor:
            output = torch.func.functional_call(layer, parameters, value.unsqueeze(0))
            return (output * gradient.unsqueeze(0)).sum()

        of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        parameters = {key: value.detach() for key, value in layer.named_parameters()}
        for key, value in of_samples(parameters, inputs[name], gradient).items():
            samples[f"{name}.{key}"] = value

    for name, layer in leaves.items():
        layer.register_forward_hook(lambda module, args, output, name=name: inputs.update({name: args[0].detach()}))
        layer.register_full_backward_hook(lambda module, inner, outer, name=name: compute(name, outer[0]))
    feature = model(image)[-1]
    factor = torch.randn_like(feature)
    (feature * factor).sum().backward()

    of_layers = {name: plain.get_parameter(name) for name in samples}
    assert {name.rpartition(".")[2] for name, _ in plain.named_parameters() if name not in samples} == {"A_log", "Ds"}
    for number in range(3):
        loss = (plain(image[number : number + 1])[-1] * factor[number]).sum()
        assert_gradients(loss, of_layers, {name: value[number] for name, value in samples.items()})


def test_per_sample_gradients_by_expanded_weights() -> None:
    """The weights are tensors of a class that forbids most functions; PyTorch has rules for norms and linear layers."""
    model, image = make(), torch.randn(3, 3, 32, 40)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("conv" not in name and not name.endswith(("A_log", "Ds")))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    feature = call_for_per_sample_grads(LastMap(model), loss_reduction="sum")(image)
    factor = torch.randn_like(feature)
    (feature * factor).sum().backward()
    for number in range(3):
        loss = (model(image[number : number + 1])[-1] * factor[number]).sum()
        assert_gradients(loss, trained, {name: value.grad_sample[number] for name, value in trained.items()})


class LastMap(nn.Module):
    def __init__(self, model: GrootV) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)[-1].contiguous()


def assert_gradients(loss: Tensor, parameters: dict[str, nn.Parameter], expected: dict[str, Tensor]) -> None:
    for name, gradient in zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True):
        torch.testing.assert_close(expected[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max())


def test_program_of_torch_jit_trace_refuses_other_sizes() -> None:
    """A portrait image has as many edges as a landscape: nothing else would tell them apart."""
    model, image = make().eval(), torch.randn(1, 3, 32, 48)
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(model, image, check_trace=False)
    torch.testing.assert_close(traced(image)[-1], model(image)[-1])
    with pytest.raises(RuntimeError, match="sizes"):
        traced(image.mT)


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
def test_activations_in_place(act: nn.Module) -> None:
    model, image = make(), torch.randn(1, 3, 32, 40)
    plain = copy.deepcopy(model)
    for used, activation in ((model, act), (plain, type(act)())):
        for parent, _ in layers(used, "act"):
            parent.act = activation
    direction = torch.randn(1, 16, 4, 5)
    for used in (model, plain):
        (used(image)[-1] * direction).sum().backward()
    torch.testing.assert_close(both_modes(model, image), both_modes(plain, image))
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hooked", [False, True])
def test_16_bits_with_norms_and_states_in_single_precision(hooked: bool) -> None:
    """As fine-tuning recipes keep them, without autocast."""
    model, image = make().bfloat16(), torch.randn(1, 3, 32, 40).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("A_log", "Ds")):
            parameter.data = parameter.data.float()
    if hooked:
        model.apply(lambda module: module.register_forward_hook(lambda *args: None))
    maps = both_modes(model, image)
    assert maps.dtype == torch.bfloat16
    model(image)[-1].float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_per_sample_gradients_by_torch_func() -> None:
    """``vmap`` of ``grad`` of a functional call."""
    model, images = make().double(), torch.randn(2, 3, 32, 40, dtype=torch.float64)
    direction = torch.randn(1, 16, 4, 5, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return (torch.func.functional_call(model, parameters, (image[None],))[-1] * direction).sum()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for index, image in enumerate(images):
        expected = torch.autograd.grad(loss(dict(model.named_parameters()), image), list(model.parameters()))
        for actual, gradient in zip(samples.values(), expected, strict=True):
            torch.testing.assert_close(actual[index], gradient)


def test_batched_gradients() -> None:
    """As ``torch.autograd.functional.jacobian(..., vectorize=True)`` computes them."""
    model, image = make(), torch.randn(2, 3, 32, 40)
    leaves, feature = list(model.parameters()), model(image)[-1]
    directions = torch.randn(2, *feature.shape)
    batched = torch.autograd.grad(feature, leaves, directions, is_grads_batched=True, retain_graph=True)
    for index, direction in enumerate(directions):
        expected = torch.autograd.grad(feature, leaves, direction, retain_graph=True)
        for actual, gradient in zip(batched, expected, strict=True):
            torch.testing.assert_close(actual[index], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_forward_mode_derivatives_are_refused(requires_grad: bool) -> None:
    model, image = make().requires_grad_(requires_grad), torch.randn(1, 3, 32, 48)
    with pytest.raises(NotImplementedError, match="use reverse mode"):
        torch.func.jvp(lambda value: model(value)[-1], (image,), (torch.ones_like(image),))
