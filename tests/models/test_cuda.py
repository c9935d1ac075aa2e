"""The backbone on a GPU: no synchronisation, mixed precision, compilation."""

import re

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from grootvl_mm.models import GrootV
from grootvl_mm.models.grootv import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def backbone() -> GrootV:
    """A small backbone on the GPU."""
    return GrootV("pico").cuda()


@pytest.fixture
def image() -> Tensor:
    """A batch of two."""
    return torch.randn(2, 3, 64, 96, device="cuda")


@pytest.mark.usefixtures("sync_debug_mode")
def test_a_training_step_does_not_wait_for_the_gpu(backbone: GrootV, image: Tensor) -> None:
    def step() -> None:
        sum(feature.square().mean() for feature in backbone(image)).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_stays_finite(backbone: GrootV, image: Tensor, dtype: torch.dtype) -> None:
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-3)
    scaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)(enabled=dtype == torch.float16)
    for _ in range(5):
        with torch.autocast("cuda", dtype):
            loss = sum(feature.float().square().mean() for feature in backbone(image))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert loss.isfinite()


def test_launches_of_a_block() -> None:
    """Of float32 inference: edge weights, tree and cut, the scan's four, norms, convolution, projections, MLP, sum."""
    block, x = Block(16).cuda().eval(), torch.randn(1, 56, 56, 16, device="cuda")
    with torch.no_grad():
        block(x)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
            block(x)
    launches = [event.name for event in watched.events() if re.match("cu(da)?LaunchKernel", event.name)]
    assert 10 < len(launches) <= 16, launches


def test_compiled_backbone_equals_eager(backbone: GrootV, image: Tensor) -> None:
    backbone.eval()
    compiled = torch.compile(backbone, fullgraph=True)
    with torch.no_grad():
        for actual, expected in zip(compiled(image), backbone(image), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
