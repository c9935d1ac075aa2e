"""The token mixer of GrootL: Mamba's with a tree over the tokens (section 3.3 and algorithm 2 of the paper)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.models.mamba.modeling_mamba import MambaMixer

from grootvl_mm.language.prompts import Prompts
from grootvl_mm.language.scan import CausalTree, PromptTree, selective_scan, take_tokens
from grootvl_mm.ops import Tree, graph_tree, sequence_edge_weight, sequence_edges


class GrootLMixer(MambaMixer):
    """Selective state space model along the tree of the prompt.

    It has exactly the parameters of ``MambaMixer``. All projections are called as modules, so that adapters, hooks and
    quantized layers work. Step sizes and scan are computed in float32 (float64 for float64 activations).
    """

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        prompts: Prompts | None = None,
    ) -> tuple[Tensor, Tree | None]:
        """Mix the tokens.

        Args:
            hidden_states: (B, L, hidden size).
            cache: States of the previous tokens; updated in place.
            attention_mask: (B, L), 0 for padding, which does not affect the other tokens.
            prompts: The prompts, whose tokens see each other; None if every token only sees previous ones.

        Returns:
            (B, L, hidden size), and the trees of the scan, or None if they are chains.
        """
        valid = None if attention_mask is None else attention_mask.unsqueeze(-1) != 0
        u, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        u = self.convolve(_clear(u, valid), cache, valid)
        u = _clear(u, valid)
        dt, b, c = self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        dtype = torch.promote_types(u.dtype, torch.float32)
        delta = _clear(F.softplus(self.dt_proj(dt).to(dtype)), valid)
        u, b, c = u.to(dtype), b.to(dtype), c.to(dtype)

        with torch.autocast(u.device.type, enabled=False):
            if self.config.tree == "causal":
                y, tree = self.scan_causal_tree(u, delta, b, c, cache, valid)
            else:
                y, tree = self.scan_prompt_tree(u, delta, b, c, cache, prompts)
            y = (y + self.D.to(dtype) * u) * F.silu(gate.to(dtype))
        return self.out_proj(y.to(gate.dtype)), tree

    def convolve(self, u: Tensor, cache: Cache | None, valid: Tensor | None) -> Tensor:
        """Causal convolution and activation, (B, L, D), continued from the cache."""
        u = u.transpose(1, 2)
        length = u.shape[2]
        if cache is None:
            return self.act(self.conv1d(u)[:, :, :length]).transpose(1, 2)
        before = cache.get_conv_state(self.layer_idx)
        columns = u if before is None else torch.cat([before.to(u.dtype), u], dim=2)
        skipped = columns.shape[2] - length
        kept = skipped + _last_tokens(u.transpose(1, 2), valid, self.conv_kernel_size)
        cache.update_conv_state(take_tokens(columns.transpose(1, 2), kept).transpose(1, 2), self.layer_idx)
        return self.act(self.conv1d(columns)[:, :, skipped : skipped + length]).transpose(1, 2)

    def scan_prompt_tree(
        self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor, cache: Cache | None, prompts: Prompts | None
    ) -> tuple[Tensor, Tree | None]:
        """``y = C (h + scale g)`` with the states h of the chain and g of the tree."""
        config = self.config
        tree = None
        if prompts is not None and config.tree_scale != 0:
            tree = self.build_prompt_tree((delta * u, b), prompts)
        recurrence = PromptTree(tree, config.tree_scale, config.edge_decay)
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
        y, left = selective_scan(u, delta, self.decay_rate(u), b, c, recurrence, state)
        if cache is not None:
            cache.update_recurrent_state(left, self.layer_idx)
        return y, tree

    def scan_causal_tree(
        self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor, cache: Cache | None, valid: Tensor | None
    ) -> tuple[Tensor, Tree]:
        """``y = C h`` with the states h of the causal tree.

        The cache holds the states and features of the last tokens, which are possible parents; the tree starts with
        them.
        """
        reach = self.config.tree_reach
        features = torch.cat([delta * u, b], -1)
        channels, size = features.shape[-1], self.A_log.numel()
        state = kept = None
        if cache is not None:
            kept = _last_tokens(u, valid, reach)
            before = cache.get_recurrent_state(self.layer_idx)
            if before is not None:
                state, before = before.split([size, channels], -1)
                state = state.unflatten(-1, self.A_log.shape)
                features = torch.cat([before, features], 1)
                kept = kept + reach
        tree = self.build_causal_tree(features.split([u.shape[-1], b.shape[-1]], -1))
        y, left = selective_scan(u, delta, self.decay_rate(u), b, c, CausalTree(tree, kept), state)
        if cache is not None:
            left = torch.cat([left.flatten(2), take_tokens(features, kept)], -1)
            cache.update_recurrent_state(left, self.layer_idx)
        return y, tree

    def decay_rate(self, like: Tensor) -> Tensor:
        """The state matrix A, (D, N), negative."""
        return -torch.exp(self.A_log.to(like.dtype))

    def build_prompt_tree(self, features: tuple[Tensor, Tensor], prompts: Prompts) -> Tree:
        """The minimum spanning tree of the tokens up to the end of the longest prompt; its root is the last of them.

        Args:
            features: ``delta u`` (B, L, D) and ``B`` (B, L, N), whose outer product is the input of a token.
            prompts: The prompts; inside them, tokens up to ``tree_reach`` apart are neighbours, elsewhere the tree is a
                chain.
        """
        reach, end = self.config.tree_reach, prompts.end
        features = tuple(feature[:, :end].detach() for feature in features)
        weight = sequence_edge_weight(features, reach, prompts.start, prompts.length)
        return graph_tree(sequence_edges(end, reach, weight.device), weight, end, root=end - 1)

    def build_causal_tree(self, features: tuple[Tensor, Tensor]) -> Tree:
        """The parent of each token is the most similar previous one, or the nearest of several; the first is the root.

        Args:
            features: See :meth:`build_prompt_tree`. Tokens with zero features, such as padding, are parents only if
                there is no other candidate.
        """
        batch, length, _ = features[0].shape
        reach, device = self.config.tree_reach, features[0].device
        weight = sequence_edge_weight(tuple(feature.detach() for feature in features), reach)
        later, earlier = sequence_edges(length, reach, device)
        is_empty = torch.stack([(feature == 0).all(-1) for feature in features]).any(0)
        weight = weight.masked_fill(is_empty[:, earlier], torch.inf)
        of_gap = weight.new_full((batch, length, reach), torch.inf)
        of_gap[:, later, later - earlier - 1] = weight
        order = torch.arange(length, device=device)
        parent = (order - 1 - of_gap.argmin(-1)).clamp(min=0)
        return Tree(parent.int(), order.int().repeat(batch, 1))


def _last_tokens(u: Tensor, valid: Tensor | None, number: int) -> Tensor:
    """Indices of the last tokens before the padding on the right, (B, number); -1 is the token before ``u``."""
    batch, length, _ = u.shape
    end = torch.full((batch, 1), length, device=u.device)
    if valid is not None:
        end = (valid.squeeze(-1) * torch.arange(1, length + 1, device=u.device)).amax(1, keepdim=True)
    return end + torch.arange(-number, 0, device=u.device)


def _clear(values: Tensor, valid: Tensor | None) -> Tensor:
    """Set padding to zero."""
    return values if valid is None else values.masked_fill(~valid, 0)
