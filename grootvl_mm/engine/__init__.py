"""Components for mmengine's Runner: hooks, optimizer wrappers and their constructors, strategies."""

from grootvl_mm.engine.optimizers import CPUAmpOptimWrapper, LayerDecayOptimWrapperConstructor

__all__ = ["CPUAmpOptimWrapper", "LayerDecayOptimWrapperConstructor"]
