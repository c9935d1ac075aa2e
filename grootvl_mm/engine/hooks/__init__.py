"""Hooks for mmengine's Runner. Importing them requires OpenCV, which the models do not need."""

from grootvl_mm.engine.hooks.complete_checkpoint_hook import CompleteCheckpointHook
from grootvl_mm.engine.hooks.global_loss_hook import GlobalLossHook
from grootvl_mm.engine.hooks.published_checkpoint_hook import PublishedCheckpointHook
from grootvl_mm.engine.hooks.ranks_agree_hook import RanksAgreeHook, RanksDifferError
from grootvl_mm.engine.hooks.resumed_validation_hook import ResumedValidationHook
from grootvl_mm.engine.hooks.step_seed_hook import StepSeedHook
from grootvl_mm.engine.hooks.tree_visualization_hook import TreeVisualizationHook
from grootvl_mm.engine.hooks.untrusted_checkpoint_hook import UntrustedCheckpointHook

__all__ = [
    "CompleteCheckpointHook",
    "GlobalLossHook",
    "PublishedCheckpointHook",
    "RanksAgreeHook",
    "RanksDifferError",
    "ResumedValidationHook",
    "StepSeedHook",
    "TreeVisualizationHook",
    "UntrustedCheckpointHook",
]
