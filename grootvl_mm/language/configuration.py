"""The configuration of GrootL: Mamba's, and how the tree over the prompt is made and weighted."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MambaConfig

TREES = ("prompt", "causal")
EDGE_DECAYS = ("next", "own")
PUBLISHED_SCALE = 0.3


@strict
class GrootLConfig(MambaConfig):
    """Configuration of :class:`~grootvl_mm.language.GrootLModel`. Takes all arguments of ``MambaConfig`` as well.

    Checkpoints of Mamba load as they are: ``GrootLConfig.from_pretrained`` accepts the ``config.json`` of a Mamba.

    Args:
        tree: ``prompt``, as published: the state of a token is that of Mamba plus ``tree_scale`` times a sum along the
            spanning tree of the prompt. ``causal`` is an extension of ours that the paper does not have: each token
            continues the state of the most similar of the ``tree_reach`` tokens before it instead of that of the last
            one, which is causal for every token and needs no prompt.
        tree_scale: weight of the tree beside the chain of Mamba, 0.3 by default; with 0 the model is Mamba. For
            ``tree='causal'`` there is no such sum, and it must be None.
        tree_reach: how many tokens back an edge of the graph may lead, at least 1. With 1 the tree is the chain:
            Mamba whose states are multiplied by ``1 + tree_scale`` (``tree='prompt'``), or Mamba (``tree='causal'``).
        edge_decay: what a state is multiplied by on its way from a token to its parent in the tree. ``next``, as the
            authors' code does it: the decay of the token that follows the child in the text, which on a chain is
            Mamba's recurrence. ``own``, as algorithm 2 of the paper writes it: the decay of the child.

    Raises:
        ValueError: an unknown tree or edge decay, a reach below 1, a scale that is not finite, or a combination
            without a meaning.
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
            raise ValueError(
                f"tree='causal' replaces the chain and has no scale: tree_scale must be None, got {self.tree_scale}"
            )
        if self.tree == "causal" and self.edge_decay != "next":
            raise ValueError(f"tree='causal' has no other edge_decay than next, got {self.edge_decay!r}")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The contents of ``config.json``; that of a Mamba is one of ours."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == MambaConfig.model_type:
            config["model_type"] = cls.model_type
        return config, kwargs
