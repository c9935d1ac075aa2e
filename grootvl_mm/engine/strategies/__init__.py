"""Strategies for mmengine's FlexibleRunner. Importing them requires a PyTorch with FSDP2."""

from grootvl_mm.engine.strategies.fully_shard import FullyShardStrategy

__all__ = ["FullyShardStrategy"]
