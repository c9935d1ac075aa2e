"""Locates the prompts of a batch: the tokens that see each other regardless of their order."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The label of tokens without loss, as in transformers."""


class Prompts(NamedTuple):
    """The prompt of each sample of a batch.

    Attributes:
        start: (B,) int64, index of the first non-padding token, where the prompt starts.
        length: (B,) int64, number of prompt tokens.
        end: Maximum end of the prompts (exclusive), where the trees end.
    """

    start: Tensor
    length: Tensor
    end: int


def prompt_lengths_of_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Count the tokens of each sample before its first one with a loss, i.e. its prompt.

    Args:
        labels: (B, L), -100 for tokens without loss.
        attention_mask: (B, L), 0 for padding on either side, which is not counted.

    Returns:
        (B,) int64. Samples without any loss are entirely prompts.
    """
    is_token = _is_token(labels, attention_mask)
    has_begun = (is_token & (labels != IGNORED)).cumsum(1) > 0
    return (is_token & ~has_begun).sum(1)


def locate_prompts(
    prompt_lengths: Tensor | Sequence[int],
    tokens: Tensor,
    attention_mask: Tensor | None = None,
) -> Prompts:
    """Locate prompts of given lengths, which start at the first non-padding token of their samples.

    Args:
        prompt_lengths: (B,) integers, 0 for samples without a prompt.
        tokens: (B, L, ...), of which shape and device are used.
        attention_mask: (B, L), 0 for padding.

    Raises:
        TypeError: The lengths are not integers.
        ValueError: There is not one length per sample, or a length is negative or exceeds the tokens of its sample.
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
            "prompt_lengths must be between 0 and the number of non-padding tokens of each sample, got "
            f"{int(lengths[sample])} for sample {sample} with {int(available[sample])} tokens; pass a prompt in a "
            "single call, and adapt its length if you truncate its tokens"
        )
    start = is_token.int().argmax(1)  # the first of the greatest
    end = int(torch.where(lengths > 0, start + lengths, 0).max()) if batch else 0
    return Prompts(start, lengths, end)


def _is_token(like: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, L) bool, False for padding."""
    if attention_mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    return attention_mask.bool()
