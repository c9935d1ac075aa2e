"""What autograd saves for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def kept_tensors() -> Iterator[dict[int, Tensor]]:
    """Collect the tensors that autograd saves within the block, one for each storage, by its address."""
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        yield kept
