"""The backbone under ``torch.compile``: one graph, the same results, the same gradients."""

import pytest
import torch
from torch import Tensor

from grootvl_mm.models import GrootV
from tests.helpers.marks import needs_compiler

pytestmark = needs_compiler

NANO = {"channels": 8, "depths": [1]}


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch._dynamo.reset()


def make(**options) -> GrootV:
    return GrootV(**{"arch": NANO, "out_indices": (len(options.get("arch", NANO)["depths"]) - 1,)} | options)


def step(network: torch.nn.Module, image: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Result and gradients, with the same dropped paths each time."""
    torch.manual_seed(0)
    (feature,) = network(image)
    return feature.detach(), *torch.autograd.grad(feature.square().mean(), parameters)


def assert_trains_alike(model: GrootV, compiled: torch.nn.Module, image: Tensor) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    actual, expected = step(compiled, image, parameters), step(model, image, parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"tree_metric": "manhattan", "tree_root": "last", "propagation": "up", "drop_path_rate": 0.3},
        {"scan": "raster", "propagation": "down", "frozen_stages": 0},
        {"scan": "cross", "with_cp": True},
        {"scan": "random", "with_cp": True},
        {"scan": "maximum", "tree_metric": "euclidean"},
        {
            "arch": {"channels": 8, "depths": [2]},
            "tree_sharing": "stage",
            "tree_metric": "euclidean",
            "layer_scale": 0.5,
            "with_cp": True,
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_trains_as_one_graph(device: torch.device, options: dict) -> None:
    model = make(**options).to(device).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_trains_alike(model, compiled, torch.randn(2, 3, 18, 21, device=device))


def test_one_graph_for_images_of_all_sizes(device: torch.device) -> None:
    model = make().to(device).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_trains_alike(model, compiled, torch.randn(2, 3, 18, 21, device=device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((3, 3, 30, 9), (5, 3, 33, 64)):
            assert_trains_alike(model, compiled, torch.randn(shape, device=device))


@pytest.mark.slow
def test_code_of_the_inductor(device: torch.device) -> None:
    model = make().to(device).train()
    assert_trains_alike(model, torch.compile(model, fullgraph=True), torch.randn(2, 3, 18, 21, device=device))
