"""Draws the trees of an image during training."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from grootvl_mm.registry import HOOKS
from grootvl_mm.visualization import TreeRecord, record_trees
from grootvl_mm.visualization.figures import COLORS, Picture, draw_trees, to_array


@HOOKS.register_module()
class TreeVisualizationHook(Hook):
    """Draw the trees of the first validation image during training.

    The figures go to the run's visualizer under the name ``trees``: ``LocalVisBackend`` writes them as PNG files to
    ``vis_image`` in the run's folder, ``TensorboardVisBackend`` to TensorBoard. They are drawn before the first
    iteration, every ``interval`` iterations and after each validation, with the model in evaluation mode; the training
    itself is unaffected. In distributed runs, all ranks must have the hook. With ``EMAHook``, the figures after
    validations have the averaged weights, as the validations do, and the name ``trees_ema``.

    Args:
        interval: Iterations between figures.
        stages: Stages to draw, counted from 0; None for all.
        color: What the edge colours show, see :func:`grootvl_mm.visualization.figures.draw_trees`.
        cut_share: Share of the edges that are cut to form the segments.
        dpi: Pixels per inch; a panel is 3.2 inches wide.

    Raises:
        ValueError: ``interval`` is below 1, ``color`` is unknown, or ``cut_share`` is not in [0, 1]. At the start of a
            run: the run has no validation data, or the model no GrootV backbone.
    """

    priority = "HIGH"  # after validations, before EMAHook puts the trained weights back

    def __init__(
        self,
        interval: int = 500,
        stages: Sequence[int] | None = None,
        color: str = "order",
        cut_share: float = 0.05,
        dpi: int = 80,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        if color not in COLORS:
            raise ValueError(f"color must be one of {', '.join(COLORS)}, got {color!r}")
        if not 0 <= cut_share <= 1:
            raise ValueError(f"cut_share must be between 0 and 1, got {cut_share}")
        self.interval = interval
        self.stages = None if stages is None else tuple(stages)
        self.color = color
        self.cut_share = cut_share
        self.dpi = dpi
        self._batch: dict[str, Any] | None = None
        self._last: dict[str, int] = {}

    def before_train(self, runner: Runner) -> None:
        """Draw the initial trees."""
        self._draw(runner, "trees", runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Draw every ``interval`` iterations."""
        if self.every_n_train_iters(runner, self.interval):
            self._draw(runner, "trees", runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Draw the trees of the validated weights."""
        averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
        self._draw(runner, "trees_ema" if averaged else "trees", runner.iter)

    def _draw(self, runner: Runner, name: str, step: int) -> None:
        if step == self._last.get(name):
            return
        self._last[name] = step
        batch = self._first_batch(runner)
        records = _record(runner.model, deepcopy(batch))
        if self.stages is not None:
            records = [record for record in records if record.stage in self.stages]
            if not records:
                raise ValueError(f"{type(self).__name__}: the model has none of the stages {self.stages}")
        if is_main_process():
            # A segmenter with sliding-window inference sees only the first window of a large image.
            height, width = records[0].height * records[0].stride, records[0].width * records[0].stride
            picture = Picture.of(batch["inputs"][0][:, :height, :width])
            picture = picture.padded(max(height, picture.size[0]), max(width, picture.size[1]))
            figure = draw_trees(records, picture, self.color, self.cut_share, title=f"iteration {step}")
            runner.visualizer.add_image(name, to_array(figure, self.dpi), step)

    def _first_batch(self, runner: Runner) -> dict[str, Any]:
        """The first validation image, before the data preprocessor."""
        if self._batch is None:
            if runner.val_loop is None:
                raise ValueError(f"{type(self).__name__} draws a validation image; set val_dataloader in the config")
            loader = runner.val_loop.dataloader
            self._batch = loader.collate_fn([loader.dataset[0]])
        return self._batch


def _record(model: torch.nn.Module, batch: dict[str, Any]) -> list[TreeRecord]:
    """The trees of each block's first call, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), record_trees(model) as records:
            model.val_step(batch)
    finally:
        for module, mode in modes:
            module.training = mode
    first: dict[str, TreeRecord] = {}
    for record in records:
        first.setdefault(record.name, record)
    return list(first.values())
