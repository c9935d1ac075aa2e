"""Results with different numbers of threads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same_with_any_number_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    """Check that a function returns bitwise the same tensors with one, two and three threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
