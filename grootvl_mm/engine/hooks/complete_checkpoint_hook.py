"""Stops a test or a resumed training whose checkpoint lacks weights of the model."""

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
    """Raise an error if the checkpoint of a test or a resumed training leaves some of the model's weights random.

    mmengine only logs missing weights and shape mismatches. Trainings that start from pretrained weights (``load_from``
    without ``resume``) are not checked: their heads are usually new.

    Args:
        allow_mismatch: For tests, log a warning instead.
    """

    # After UntrustedCheckpointHook, before hooks that load the weights into their own models (EMAHook).
    priority = "VERY_HIGH"

    def __init__(self, allow_mismatch: bool = False) -> None:
        self.allow_mismatch = allow_mismatch
        self._loaded: list[LoadedWeights] = []

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Start watching which weights are loaded into the model and, when resuming, into EMAHook's averaged model."""
        self._loaded = [LoadedWeights(runner.model)]
        if runner._resume:
            averaged = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
            # Immediately, before torch's load_state_dict raises its own error.
            self._loaded += [LoadedWeights(model, at_once=True) for model in averaged]

    def before_train(self, runner: Runner) -> None:
        """Raise a :class:`CheckpointError` if a resumed checkpoint lacks weights."""
        self._finish(allow=not runner._resume)

    def before_val(self, runner: Runner) -> None:
        """See :meth:`before_test`."""
        self._finish(allow=self.allow_mismatch)

    def before_test(self, runner: Runner) -> None:
        """Raise a :class:`CheckpointError`, or warn, if the checkpoint lacks weights."""
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
