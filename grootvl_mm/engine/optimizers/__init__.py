"""Optimizer wrappers and their constructors."""

from grootvl_mm.engine.optimizers.cpu_amp_optim_wrapper import CPUAmpOptimWrapper
from grootvl_mm.engine.optimizers.layer_decay_constructor import LayerDecayOptimWrapperConstructor

__all__ = ["CPUAmpOptimWrapper", "LayerDecayOptimWrapperConstructor"]
