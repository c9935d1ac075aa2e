"""Makes sure that what is tested or resumed is what the checkpoint holds."""

import logging
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from grootvl_mm.registry import HOOKS
from grootvl_mm.utils.loaded_weights import LoadedWeights
from grootvl_mm.utils.safe_checkpoints import CheckpointError


@HOOKS.register_module()
class CompleteCheckpointHook(Hook):
    """Stop a test, or a training that is resumed, if the checkpoint leaves some of the model's weights random.

    mmengine only logs what is missing, or has another shape. A training that starts from weights (``load_from`` without
    ``resume``) is left alone: there, new heads are the rule.

    Args:
        allow_mismatch: Warn instead.
    """

    # After UntrustedCheckpointHook, before those that load the weights into models of their own.
    priority = "VERY_HIGH"

    def __init__(self, allow_mismatch: bool = False) -> None:
        self.allow_mismatch = allow_mismatch
        self._loaded: list[LoadedWeights] = []

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Watch what mmengine loads next, and EMAHook in a training that is resumed."""
        self._loaded = [LoadedWeights(runner.model)]
        if runner._resume:
            averaged = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
            # At once, because PyTorch has errors of its own for these.
            self._loaded += [LoadedWeights(model, at_once=True) for model in averaged]

    def before_train(self, runner: Runner) -> None:
        """Raise a :class:`CheckpointError` if a resumed model is not complete."""
        self._finish(allow=not runner._resume)

    def before_val(self, runner: Runner) -> None:
        """As :meth:`before_test`."""
        self._finish(allow=self.allow_mismatch)

    def before_test(self, runner: Runner) -> None:
        """Raise a :class:`CheckpointError` if the model is not complete."""
        self._finish(allow=self.allow_mismatch)

    def _finish(self, allow: bool) -> None:
        loaded, self._loaded = self._loaded, []
        for watched in loaded:
            try:
                watched.finish()
            except CheckpointError as error:
                if not allow:
                    raise
                print_log(str(error), "current", logging.WARNING)
