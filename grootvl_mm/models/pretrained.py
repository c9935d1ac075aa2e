"""Checks that pretrained weights are complete."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.model import BaseModule, PretrainedInit

from grootvl_mm.utils.host_loaders import safe_loaders
from grootvl_mm.utils.loaded_weights import all_weights_loaded
from grootvl_mm.utils.safe_checkpoints import CheckpointError


@contextmanager
def complete_pretraining(module: BaseModule) -> Iterator[None]:
    """Context manager for mmengine's ``init_weights``: check that a ``Pretrained`` ``init_cfg`` sets every weight.

    Raises:
        CheckpointError: the file is damaged or unsafe, or a weight is missing or has another shape or type.
    """
    parts = module.init_cfg if isinstance(module.init_cfg, list) else [module.init_cfg]
    files = [part["checkpoint"] for part in parts if part and part["type"] in ("Pretrained", PretrainedInit)]
    if module.is_init or not files:
        yield
        return
    try:
        with safe_loaders(), all_weights_loaded(module):
            yield
    except AssertionError as error:  # raised by mmengine if no name begins with the prefix
        raise CheckpointError(f"{files[-1]}: {error}; check init_cfg's prefix") from error
