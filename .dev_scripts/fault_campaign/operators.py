"""Direct calls of the operators with invalid arguments."""

import os
import random
import resource

import torch

from fault_campaign.results import Result
from grootvl_mm.ops import grid_edge_weight, grid_tree, reference


def random_case(rng: random.Random) -> None:
    """Call the operators directly with random sizes and strides; only invalid trees may cause errors."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    height, width, batch, channels = (rng.choice([1, 1, 2, 3, 5, 8]) for _ in range(4))
    vertices = height * width
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    x = strided(torch.randn(batch, vertices, channels, generator=generator).to(dtype), rng)
    decay = strided(torch.rand(batch, vertices, channels, generator=generator).to(dtype), rng)
    weight = grid_edge_weight(strided(torch.randn(batch, channels, height, width, generator=generator), rng))
    parent, order = (strided(part, rng) for part in grid_tree(weight, height, width))
    hostile = rng.random() < 0.7
    if hostile:
        low, high = rng.choice([(0, vertices), (-3, vertices + 3), (-(2**31), 2**31 - 1)])
        parts = [parent.contiguous().clone(), order.contiguous().clone()]
        part = parts[rng.randrange(2)]
        for _ in range(rng.randint(1, vertices)):
            part.view(-1)[rng.randrange(part.numel())] = rng.randrange(low, high)
        parent, order = (strided(part, rng) for part in parts)
        if rng.random() < 0.2:
            parent = parent[:, : rng.randint(0, vertices)]
    arguments = (x, decay, parent, order, rng.choice(["all", "up", "down"]))
    try:
        result = torch.ops.grootvl.tree_scan(*arguments)
        torch.ops.grootvl.tree_scan_backward(torch.ones_like(result), *arguments)
    except (RuntimeError, ValueError, TypeError, IndexError):
        if not hostile:
            raise
        return
    if not hostile:
        expected = reference.tree_scan(*(value.double() for value in arguments[:2]), *arguments[2:])
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def strided(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values with other strides or another storage offset."""
    choice = rng.randrange(4)
    if choice == 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if choice == 2:
        wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
        wide[..., ::2] = value
        return wide[..., ::2]
    if choice == 3:
        return torch.cat([value[:1], value])[1:]
    return value


def operators(count: int, rng: random.Random) -> Result:
    """Random and hostile calls of the operators: a correct result or an error, and memory does not grow."""
    faults = []
    seeds = [rng.randrange(2**62) for _ in range(count)]
    half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, seed in enumerate(seeds):
        if number == count // 2:
            half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            random_case(random.Random(seed))
        except Exception as error:
            faults.append(f"case {seed}: {type(error).__name__}: {str(error)[:200]}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - half) / 1024
    if grown > 16:
        faults.append(f"the process grew by {grown:.0f} MiB in the second half")
    kernels = os.environ.get("GROOTVL_CPU_ISA", "best of this machine")
    return Result(
        f"{count} calls, instruction set: {kernels}; memory grew by {grown:.1f} MiB in the second half", faults
    )
