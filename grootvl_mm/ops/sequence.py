"""The graph of a token sequence for GrootL: each token is connected to the few tokens before it."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from grootvl_mm.ops._checks import check_same_device, check_tensor, unwatched
from grootvl_mm.ops.reference import accumulated

_EPS = 1e-8


def sequence_edges(length: int, reach: int = 3, device: torch.device | str | None = None) -> Tensor:
    """Edges between tokens of a sequence that are at most ``reach`` apart, for :func:`graph_tree`.

    They are sorted from the last token to the first, and for each token by increasing distance; this order breaks ties
    between equal weights.

    Args:
        length: number of tokens L, at least 1.
        reach: largest distance of two connected tokens, at least 1; with 1 the graph is a chain.
        device: device of the result.

    Returns:
        (2, E) int64, the later and the earlier token of each edge.

    Raises:
        ValueError: ``length`` or ``reach`` is below 1.
    """
    if length < 1 or reach < 1:
        raise ValueError(f"length and reach must be at least 1, got {length} and {reach}")
    reach = min(reach, length - 1)
    # Tokens with `reach` predecessors first, then those with fewer.
    token = torch.arange(length - 1, reach - 1, -1, device=device).unsqueeze(1)
    full = [(token - gap).expand(-1, reach).flatten() for gap in (0, torch.arange(1, reach + 1, device=device))]
    row, column = torch.triu_indices(max(reach - 1, 0), max(reach - 1, 0), device=device)
    return torch.stack([torch.cat([full[0], reach - 1 - row]), torch.cat([full[1], reach - 2 - column])])


def sequence_edge_weight(
    features: Tensor | Sequence[Tensor],
    reach: int = 3,
    span_start: Tensor | None = None,
    span_length: Tensor | None = None,
) -> Tensor:
    """Edge weights ``exp(-cos(f_u, f_v))`` for the edges of :func:`sequence_edges`.

    Several features represent their outer product, ``f_t = features[0]_t x features[1]_t x ...``, which is never
    materialized: the cosine of outer products is the product of the cosines. Norms of the outer product are clamped to
    at least 1e-8. Sums are accumulated in float32 (float64 for float64 features). The result has no gradient.

    Edges between tokens more than 1 apart are restricted to a span of the sequence, such as its prompt: outside the
    span their weights are infinite, so that the tree is the chain of the tokens there. One set of edges thus serves a
    batch with different spans.

    Args:
        features: (B, L, C), or several such tensors, which may differ in C; float32, float64, float16 or bfloat16.
        reach: the ``reach`` of :func:`sequence_edges`.
        span_start: (B,) int64 or int32, first token of each span; 0 by default.
        span_length: (B,) int64 or int32, number of tokens in each span; up to the end of the sequence by default. Spans
            may extend beyond the sequence, and may be empty.

    Returns:
        (B, E) float32 (float64 for float64 features). Never NaN: NaN is replaced by the largest finite value.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes or devices do not match, or ``reach`` is below 1.
    """
    features = (features,) if isinstance(features, Tensor) else tuple(features)
    _check_sequence(features, reach, span_start, span_length)
    length = features[0].shape[1]
    later, earlier = sequence_edges(length, reach, features[0].device)
    gap = later - earlier
    # The index of each edge in the result of _cosines.
    place = (gap - 1) * length - gap * (gap - 1) // 2 + earlier
    with torch.no_grad():
        weight = torch.exp(-_cosines(features, min(reach, length - 1)))[:, place]
    weight = torch.where(weight.isfinite(), weight, torch.finfo(weight.dtype).max)
    if span_start is None and span_length is None:
        return weight
    start = 0 if span_start is None else span_start.unsqueeze(1)
    is_inside = earlier >= start
    if span_length is not None:
        is_inside = is_inside & (later < start + span_length.unsqueeze(1))
    return torch.where(is_inside | (gap == 1), weight, torch.inf)


def _cosines(features: Sequence[Tensor], reach: int) -> Tensor:
    """The cosines of all pairs of tokens that are 1 apart, then of those 2 apart, and so on: (B, E)."""
    # `accumulated` is contiguous, so that all sums are rounded in the same way: equal tokens get equal weights.
    features = [accumulated(feature) for feature in features]
    norm = reduce(torch.mul, [feature.square().sum(-1).sqrt() for feature in features]).clamp(min=_EPS)
    cosines = [norm[:, :0]]
    for gap in range(1, reach + 1):
        dot = reduce(torch.mul, [(feature[:, gap:] * feature[:, :-gap]).sum(-1) for feature in features])
        cosines.append(dot / (norm[:, gap:] * norm[:, :-gap]))
    return torch.cat(cosines, 1)


@unwatched
def _check_sequence(
    features: Sequence[Tensor],
    reach: int,
    span_start: Tensor | None,
    span_length: Tensor | None,
) -> None:
    if reach < 1:
        raise ValueError(f"reach must be at least 1, got {reach}")
    if not features:
        raise ValueError("features must be at least one tensor (B, L, C), got none")
    for k, feature in enumerate(features):
        check_tensor(f"features[{k}]", feature, "(B, L, C)", 3)
        if feature.shape[1] < 1:
            raise ValueError(f"features[{k}] must have at least one token, got shape {tuple(feature.shape)}")
        if feature.shape[:2] != features[0].shape[:2] or feature.dtype != features[0].dtype:
            raise ValueError(
                f"all features must have the same B, L and dtype, got {tuple(features[0].shape)} {features[0].dtype} "
                f"and {tuple(feature.shape)} {feature.dtype}"
            )
    given = {"span_start": span_start, "span_length": span_length}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        check_tensor(name, value, "(B,)", 1, (torch.int64, torch.int32))
        if value.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"{name} must have a value for each of the {features[0].shape[0]} sequences, "
                f"got shape {tuple(value.shape)}"
            )
    check_same_device(**given, **{f"features[{k}]": feature for k, feature in enumerate(features)})
