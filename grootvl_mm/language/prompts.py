"""Where the prompts of a batch lie: the tokens that may see each other, whatever their order in the text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The label of tokens without loss, in all of transformers."""


class Prompts(NamedTuple):
    """The prompt of each sample of a batch.

    Attributes:
        start: (B,) int64, the first token that is no padding.
        length: (B,) int64, the number of prompt tokens, which follow ``start`` without a gap.
        end: the end of the last prompt, which no tree reaches beyond.
    """

    start: Tensor
    length: Tensor
    end: int


def prompt_lengths_of_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """How many tokens each sample has before the first one with a loss: its prompt.

    Args:
        labels: (B, L), -100 for tokens without loss.
        attention_mask: (B, L), 0 for padding, which is not counted, on either side.

    Returns:
        (B,) int64. Samples without any loss are prompts as a whole.
    """
    is_token = _is_token(labels, attention_mask)
    has_begun = (is_token & (labels != IGNORED)).cumsum(1) > 0
    return (is_token & ~has_begun).sum(1)


def locate_prompts(
    prompt_lengths: Tensor | Sequence[int],
    tokens: Tensor,
    attention_mask: Tensor | None = None,
) -> Prompts:
    """The prompts of given lengths, each from the first token of its sample that is no padding.

    Args:
        prompt_lengths: (B,) integers, 0 for samples without prompt.
        tokens: (B, L, ...), for its shape and device.
        attention_mask: (B, L), 0 for padding.

    Raises:
        TypeError: lengths that are no integers.
        ValueError: not one length for each sample, or one that is negative or exceeds the tokens of its sample.
    """
    batch = tokens.shape[0]
    lengths = torch.as_tensor(prompt_lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"prompt_lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(
            f"prompt_lengths must have one length for each of the {batch} samples, got shape {tuple(lengths.shape)}"
        )
    lengths = lengths.to(tokens.device, torch.int64)
    is_token = _is_token(tokens[:, :, 0] if tokens.dim() == 3 else tokens, attention_mask)
    available = is_token.sum(1)
    wrong = ((lengths < 0) | (lengths > available)).nonzero()
    if len(wrong):
        sample = int(wrong[0])
        raise ValueError(
            f"prompt_lengths must be between 0 and the number of tokens of each sample without padding, got "
            f"{int(lengths[sample])} for sample {sample} with {int(available[sample])} tokens. A prompt must be passed "
            "in one call and be cut where its tokens are cut"
        )
    start = is_token.int().argmax(1)  # the first of the greatest
    end = int(torch.where(lengths > 0, start + lengths, 0).max()) if batch else 0
    return Prompts(start, lengths, end)


def _is_token(like: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, L) bool, False for padding."""
    if attention_mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return attention_mask.bool()
