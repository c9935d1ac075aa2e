"""Builds the model of a config with the weights of a file, for tools that look at what a model does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

from grootvl_mm.apis import cli
from grootvl_mm.utils.loaded_weights import all_weights_loaded

NO_CHECKPOINT = "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without mmengine's line for each weight that it initializes."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


def load_model(cfg: Config, checkpoint: str, seed: int = 0) -> nn.Module:
    """Build the model of a config in evaluation mode on the CPU, with the weights of a checkpoint.

    Args:
        cfg: of one of the three tasks; its default scope becomes that of this process.
        checkpoint: path of the file. ``none`` for the weights with which a training of the config starts, the same at
            each call.
        seed: of these weights.
    """
    init_default_scope(cfg.default_scope)
    model_cfg = cfg.model.copy()
    if "data_preprocessor" in cfg:
        model_cfg.setdefault("data_preprocessor", cfg.data_preprocessor)
    if checkpoint == NO_CHECKPOINT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MODELS.build(model_cfg)
            with cli.checkpoint_errors(), _quiet():
                model.init_weights()
        return model.eval()
    cli.check_file(checkpoint, "checkpoint", f"give the path of a .pth file, or {NO_CHECKPOINT} for initial weights")
    model = MODELS.build(model_cfg)
    with cli.checkpoint_errors(checkpoint), all_weights_loaded(model):
        load_checkpoint(model, checkpoint, map_location="cpu", logger="silent")
    return model.eval()
