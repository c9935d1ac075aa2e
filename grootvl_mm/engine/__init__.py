"""What training and its tools need beside the models."""

from grootvl_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ["LayerDecayOptimWrapperConstructor"]
