"""Builds a config's model with the weights of a checkpoint, for the visualization and analysis tools."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from grootvl_mm.apis import cli
from grootvl_mm.models import GrootV
from grootvl_mm.visualization import find_backbone

NO_CHECKPOINT = "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress mmengine's log line for each weight that it initializes."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


def load_model(cfg: Config, checkpoint: str, seed: int = 0) -> nn.Module:
    """Build a config's model on the CPU in evaluation mode and load a checkpoint, or exit with a one-line error.

    Args:
        cfg: A detection, segmentation or classification config; its default scope becomes the current one.
        checkpoint: Path or URL of the file, or ``none`` for the initial weights of a training.
        seed: Seed of the initial weights.
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
    model = MODELS.build(model_cfg)
    cli.load_weights(model, checkpoint, f"give the path of a .pth file, or {NO_CHECKPOINT} for initial weights")
    return model.eval()


def load_grootv(cfg: Config, checkpoint: str, seed: int = 0) -> tuple[nn.Module, GrootV]:
    """:func:`load_model` for a model with a GrootV backbone, which is returned too; any other model is an error."""
    model = load_model(cfg, checkpoint, seed)
    try:
        return model, find_backbone(model)
    except ValueError as error:
        cli.fail(f"{cfg.filename}: {error}")
