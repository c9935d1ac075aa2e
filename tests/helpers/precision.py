"""How far from float32 a result of 16 bits may be, and what of a computation has 16 bits."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def assert_rounded_once(actual: Tensor, exact: Tensor) -> None:
    """That 16-bit values are float32 ones to half a unit in the last place, and to what float32 itself rounds."""
    limits = torch.finfo(actual.dtype)
    assert exact.dtype == torch.float32
    assert actual.isfinite().all()
    # Beside half a unit: sums in another order, of terms that may be larger than their sum.
    bound = exact.abs() * limits.eps / 2 * 1.001 + 1e-5 * exact.abs().amax().clamp(min=1)
    worst = ((actual.float() - exact).abs() - bound).amax().item() if actual.numel() else 0.0
    assert worst <= 0, f"{actual.dtype}: {worst:.3g} beyond the bound"


def copied_elements(run: Callable[[], object]) -> int:
    """The size of the largest tensor that is copied or cast by PyTorch while ``run`` is called."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    events = [event for event in profiler.key_averages(group_by_input_shape=True) if event.key == "aten::copy_"]
    return max((torch.Size(event.input_shapes[0]).numel() for event in events), default=0)
