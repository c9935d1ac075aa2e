"""Small GrootL models with random weights, and batches for them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grootvl_mm.language import GrootLConfig, GrootLForCausalLM

SIZES = {"vocab_size": 61, "hidden_size": 24, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}
# Every kind of recurrence.
VARIANTS = {
    "published": {},
    "plain": {"tree_scale": 0.0},
    "chain": {"tree_reach": 1},
    "own decay": {"edge_decay": "own"},
    "own decay, chain": {"edge_decay": "own", "tree_reach": 1},
    "causal": {"tree": "causal"},
}


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model weights that let every part of it matter, for evaluation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("proj.weight", "conv1d.weight", "embeddings.weight")):
                parameter.normal_(std=0.3)
    return model.eval()


def small_model(**config: object) -> GrootLForCausalLM:
    """A model with sizes as above; the same for the same arguments."""
    torch.manual_seed(0)
    return randomize(GrootLForCausalLM(GrootLConfig(**(SIZES | config))))


def random_texts(*lengths: int) -> list[Tensor]:
    """Tokens of texts."""
    return [torch.randint(SIZES["vocab_size"], (length,)) for length in lengths]


def pad(texts: Sequence[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor, list[slice]]:
    """Texts as a batch, 4 longer than the longest of them: ids, attention mask, and where each text lies.

    Args:
        texts: of any lengths.
        side: ``left``, ``right`` or ``both``.
        fill: the token that pads.
    """
    length = max(len(text) for text in texts) + 4
    ids = torch.full((len(texts), length), fill)
    mask = torch.zeros_like(ids)
    places = []
    for row, text in enumerate(texts):
        free = length - len(text)
        start = {"left": free, "right": 0, "both": free // 2}[side]
        places.append(slice(start, start + len(text)))
        ids[row, places[-1]] = text
        mask[row, places[-1]] = 1
    return ids, mask, places
