"""Strategies of mmengine's FlexibleRunner. Importing them takes PyTorch's FSDP2."""

from grootvl_mm.engine.strategies.fully_shard import FullyShardStrategy

__all__ = ["FullyShardStrategy"]
