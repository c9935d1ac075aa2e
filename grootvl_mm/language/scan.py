"""The selective scan of GrootL: Mamba's chain with an additional tree over the prompt, or a causal tree instead.

With decay ``A_t = exp(A delta_t)`` and input ``x_t = delta_t u_t B_t``, each (D, N) for every token:

- chain:  ``h_t = A_t h_{t-1} + x_t``, which is Mamba;
- tree:   ``g_t = x_t + sum_{c: parent(c) = t} A_{c+1} g_c``, from the leaves to the root, the last token;
- state:  ``s_t = h_t + scale g_t``;
- output: ``y_t = C_t s_t``, summed over the N states.

After the prompt the tree is a chain, so ``s_t = A_t s_{t-1} + (1 + scale) x_t``: decoding needs a single state, and the
tree only has to span the prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grootvl_mm.ops import Tree, tree_scan

# Maximum size (B x L x D x N) of a scan: several such tensors should fit into a CPU's cache, or fill a GPU.
_NUMBERS_AT_ONCE = {"cpu": 1 << 20}
_NUMBERS_AT_ONCE_ELSEWHERE = 1 << 26


class PromptTree(NamedTuple):
    """The chain plus the tree of the prompt.

    Attributes:
        tree: Tree of the first T tokens, whose root is the last of them; None for a chain.
        scale: Weight of the tree.
        edge_decay: ``next`` as above, or ``own``: ``g_t = x_t + sum_c A_c g_c``.
    """

    tree: Tree | None
    scale: float
    edge_decay: str

    def states(self, x: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """``s`` of all tokens, (B, L, C), and the state for the next token, (B, K, C)."""
        return (self._own if self.edge_decay == "own" else self._next)(x, decay, state)

    def _next(self, x: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        carried = None if state is None else decay[:, 0] * state[:, 0]
        if self.tree is None:
            s = chain_scan(x * (1 + self.scale), decay, carried)
            return s, s[:, -1:]
        end = self.tree.parent.shape[1]
        h = chain_scan(x[:, :end], decay[:, :end])
        g = tree_scan(x[:, :end], decay[:, :end].roll(-1, 1), self.tree, "up")
        s = h + self.scale * g
        if end < x.shape[1]:
            rest = chain_scan(x[:, end:] * (1 + self.scale), decay[:, end:], decay[:, end] * s[:, -1])
            s = torch.cat([s, rest], 1)
        return s, s[:, -1:]

    def _own(self, x: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """On a chain, ``g`` does not follow Mamba's recurrence, so there are two states: ``h_t`` and ``A_t g_t``."""
        h = chain_scan(x, decay, None if state is None else decay[:, 0] * state[:, 0])
        if self.tree is None:
            g = chain_scan(x, decay.roll(1, 1), None if state is None else state[:, 1])
        else:
            end = self.tree.parent.shape[1]
            g = tree_scan(x[:, :end], decay[:, :end], self.tree, "up")
            if end < x.shape[1]:
                rest = chain_scan(x[:, end:], decay[:, end - 1 : -1], decay[:, end - 1] * g[:, -1])
                g = torch.cat([g, rest], 1)
        return h + self.scale * g, torch.stack([h[:, -1], decay[:, -1] * g[:, -1]], 1)


class CausalTree(NamedTuple):
    """``h_t = x_t + A_t h_{parent(t)}``, where parents precede their children in the text.

    Attributes:
        tree: Tree of the K tokens whose states are given and all following tokens; the first is the root.
        kept: (B, K) int64, indices of the tokens whose states the next token may need, negative for none; or None.
    """

    tree: Tree
    kept: Tensor | None

    def states(self, x: Tensor, decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``h`` of all tokens, (B, L, C), and the states for the next token, (B, K, C)."""
        before = 0 if state is None else state.shape[1]
        if state is not None:
            x, decay = torch.cat([state, x], 1), torch.cat([torch.zeros_like(state), decay], 1)
        h = tree_scan(x, decay, self.tree, "down")
        return h[:, before:], None if self.kept is None else take_tokens(h, self.kept)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    recurrence: PromptTree | CausalTree,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scan the tokens, some channels at a time.

    Tensors of size L x D x N only exist for the channels being scanned: in training they are recomputed in the backward
    pass, as in Mamba's CUDA kernel.

    Args:
        u: (B, L, D), float32 or float64, like all others.
        delta: (B, L, D), step sizes; 0 for padding, which leaves the state unchanged.
        a: (D, N), negative.
        b: (B, L, N).
        c: (B, L, N).
        recurrence: The recurrence of the states.
        state: (B, K, D, N), states of the previous tokens, or None.

    Returns:
        (B, L, D), and the states for the next token, (B, K, D, N).
    """
    batch, length, channels = u.shape
    at_once = _NUMBERS_AT_ONCE.get(u.device.type, _NUMBERS_AT_ONCE_ELSEWHERE)
    width = max(1, at_once // max(1, batch * length * a.shape[1]))
    recompute = torch.is_grad_enabled() and length > 1
    outputs, states = [], []
    for first in range(0, channels, width):
        part = slice(first, first + width)
        inputs = u[..., part], delta[..., part], a[part], b, c, recurrence, None if state is None else state[:, :, part]
        if recompute:
            output, left = checkpoint(_scan_channels, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            output, left = _scan_channels(*inputs)
        outputs.append(output)
        states.append(left)
    output = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    if states[0] is None:
        return output, None
    return output, torch.cat(states, 2) if len(states) > 1 else states[0]


def _scan_channels(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    recurrence: PromptTree | CausalTree,
    state: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    shape = (*u.shape, a.shape[1])
    decay = torch.exp(delta.unsqueeze(-1) * a).flatten(2)
    x = ((delta * u).unsqueeze(-1) * b.unsqueeze(2)).flatten(2)
    s, left = recurrence.states(x, decay, None if state is None else state.flatten(2))
    y = torch.matmul(s.view(shape), c.unsqueeze(-1)).squeeze(-1)
    return y, None if left is None else left.unflatten(2, shape[2:]).clone()  # a view would keep all states alive


def chain_scan(x: Tensor, decay: Tensor, carried: Tensor | None = None) -> Tensor:
    """``h_t = decay_t h_{t-1} + x_t``, where ``carried`` is ``decay_0 h_{-1}``; ``decay_0`` itself is not used."""
    batch, length, _ = x.shape
    if carried is not None:
        x = torch.cat([x[:, :1] + carried.unsqueeze(1), x[:, 1:]], 1)
    if length == 1:
        return x
    order = torch.arange(length, dtype=torch.int32, device=x.device).expand(batch, -1)
    return tree_scan(x, decay, Tree((order - 1).clamp(min=0), order), "down")


def take_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """Select tokens of each sample, (B, L, C) and indices (B, K) to (B, K, C); negative indices give zeros."""
    taken = values[torch.arange(len(values), device=values.device).unsqueeze(1), tokens.clamp(min=0)]
    return taken.masked_fill((tokens < 0).unsqueeze(-1), 0)
