"""GrootL's scans, one token after the other in float64: the oracle of the language models."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """What a mixer scans, for one sample: u and delta (L, D), a (D, N), b and c (L, N)."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def inputs(self) -> Tensor:
        """The input of each token to the state, (L, D, N)."""
        return torch.einsum("ld,ld,ln->ldn", self.delta, self.u, self.b)

    def decays(self) -> Tensor:
        """The decay of the state at each token, (L, D, N)."""
        return torch.einsum("ld,dn->ldn", self.delta, self.a).exp()

    def readout(self, states: Tensor) -> Tensor:
        """(L, D)"""
        return torch.einsum("ldn,ln->ld", states, self.c)


def random_tokens(length: int, channels: int = 5, size: int = 3) -> Tokens:
    """Tokens like those of a mixer."""
    return Tokens(
        torch.randn(length, channels, dtype=torch.float64),
        torch.rand(length, channels, dtype=torch.float64),
        -torch.rand(channels, size, dtype=torch.float64) - 0.1,
        torch.randn(length, size, dtype=torch.float64),
        torch.randn(length, size, dtype=torch.float64),
    )


def similarity(tokens: Tokens, first: int, second: int) -> float:
    """The cosine of what two tokens bring."""
    x = tokens.inputs().flatten(1)
    return float(torch.cosine_similarity(x[first], x[second], dim=0))


def candidate_edges(length: int, prompt: int, reach: int) -> Iterator[tuple[int, int]]:
    """All neighbours in the order of the published code: later and earlier token."""
    for later in range(length - 1, 0, -1):
        for earlier in range(later - 1, max(later - reach, 0) - 1, -1):
            if earlier == later - 1 or later < prompt:
                yield later, earlier


def tree_neighbours(tokens: Tokens, prompt: int, reach: int) -> list[list[int]]:
    """Kruskal's minimum spanning tree with weights exp(-cos), as lists of neighbours."""
    length = len(tokens.u)
    edges = list(candidate_edges(length, prompt, reach))
    component = list(range(length))

    def find(vertex: int) -> int:
        while component[vertex] != vertex:
            vertex = component[vertex]
        return vertex

    neighbours = [[] for _ in range(length)]
    for _, later, earlier in sorted((-similarity(tokens, *edge), *edge) for edge in edges):
        ends = find(later), find(earlier)
        if ends[0] != ends[1]:
            component[ends[0]] = ends[1]
            neighbours[later].append(earlier)
            neighbours[earlier].append(later)
    return neighbours


def chain_states(tokens: Tokens) -> Tensor:
    """Mamba's."""
    states, state = [], torch.zeros_like(tokens.inputs()[0])
    for x, decay in zip(tokens.inputs(), tokens.decays(), strict=True):
        state = decay * state + x
        states.append(state)
    return torch.stack(states)


def tree_states(tokens: Tokens, prompt: int, reach: int, edge_decay: str) -> Tensor:
    """From the leaves to the last token, along the tree."""
    neighbours, x, decays = tree_neighbours(tokens, prompt, reach), tokens.inputs(), tokens.decays()
    states = x.clone()

    def visit(vertex: int, parent: int | None) -> None:
        for child in neighbours[vertex]:
            if child != parent:
                visit(child, vertex)
                states[vertex] += decays[child + 1 if edge_decay == "next" else child] * states[child]

    visit(len(x) - 1, None)
    return states


def causal_states(tokens: Tokens, reach: int) -> Tensor:
    """Each token continues the most similar one of those before it."""
    x, decays, states = tokens.inputs(), tokens.decays(), []
    for t in range(len(x)):
        before = range(t - 1, max(t - reach, 0) - 1, -1)
        parent = max(before, key=lambda earlier: similarity(tokens, t, earlier), default=None)
        states.append(x[t] if parent is None else x[t] + decays[t] * states[parent])
    return torch.stack(states)
