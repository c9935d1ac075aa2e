"""The configuration of GrootL: Mamba's, plus the options of the tree over the prompt."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig

TREES = ("prompt", "causal")
EDGE_DECAYS = ("next", "own")
PUBLISHED_SCALE = 0.3


@strict
class GrootLConfig(MambaConfig):
    """Configuration of :class:`~grootvl_mm.language.GrootLModel`; also accepts all arguments of ``MambaConfig``.

    Mamba checkpoints load unchanged: ``GrootLConfig.from_pretrained`` accepts the ``config.json`` of a Mamba model.

    Args:
        tree: ``prompt``, as published: the state of a token is Mamba's plus ``tree_scale`` times a sum along the
            spanning tree of the prompt. ``causal``, our extension, which is not in the paper: each token continues the
            state of the most similar of the previous ``tree_reach`` tokens instead of that of the last one, which is
            causal for every token and needs no prompt.
        tree_scale: Weight of the tree's sum; default: 0.3. With 0 the model is Mamba. Must be None for
            ``tree='causal'``.
        tree_reach: Maximum distance in tokens between the two ends of an edge of the graph, at least 1. With 1 the tree
            is a chain: Mamba with its states multiplied by ``1 + tree_scale`` (``tree='prompt'``), or Mamba itself
            (``tree='causal'``).
        edge_decay: The factor on an edge of the tree. ``next``, as in the authors' code: the decay of the token that
            follows the child in the text, which on a chain is Mamba's recurrence. ``own``, as in algorithm 2 of the
            paper: the decay of the child.

    Raises:
        ValueError: ``tree`` or ``edge_decay`` is unknown, ``tree_reach`` is below 1, ``tree_scale`` is not finite, or
            ``tree='causal'`` is combined with a ``tree_scale`` or another ``edge_decay`` than ``next``.
    """

    model_type = "grootl"

    tree: str = "prompt"
    tree_scale: float | int | None = None
    tree_reach: int = 3
    edge_decay: str = "next"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.tree == "prompt" and self.tree_scale is None:
            self.tree_scale = PUBLISHED_SCALE
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name, value, choices in (("tree", self.tree, TREES), ("edge_decay", self.edge_decay, EDGE_DECAYS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.tree_reach < 1:
            raise ValueError(f"tree_reach must be at least 1, got {self.tree_reach}")
        if self.tree_scale is not None and not math.isfinite(self.tree_scale):
            raise ValueError(f"tree_scale must be finite, got {self.tree_scale}")
        if self.tree == "causal" and self.tree_scale is not None:
            raise ValueError(f"tree='causal' has no scale: tree_scale must be None, got {self.tree_scale}")
        if self.tree == "causal" and self.edge_decay != "next":
            raise ValueError(f"tree='causal' needs edge_decay='next', got {self.edge_decay!r}")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Read ``config.json``; that of a Mamba model is accepted, too."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == MambaConfig.model_type:
            config["model_type"] = cls.model_type
        return config, kwargs
