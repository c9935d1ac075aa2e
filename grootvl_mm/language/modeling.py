"""GrootL: Mamba with a tree over the prompt, as a language model for Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mamba.modeling_mamba import (
    MambaCausalLMOutput,
    MambaOutput,
    MambaPreTrainedModel,
    MambaRMSNorm,
)

from grootvl_mm.language.configuration import GrootLConfig
from grootvl_mm.language.mixer import GrootLMixer
from grootvl_mm.language.prompts import Prompts, locate_prompts, prompt_lengths_of_labels
from grootvl_mm.language.scan import take_tokens
from grootvl_mm.ops import Tree


@dataclass
class GrootLModelOutput(MambaOutput):
    """Mamba's output, and with ``output_trees`` the trees of each layer, None for chains."""

    trees: tuple[Tree | None, ...] | None = None


@dataclass
class GrootLCausalLMOutput(MambaCausalLMOutput):
    """Mamba's output, and with ``output_trees`` the trees of each layer, None for chains."""

    trees: tuple[Tree | None, ...] | None = None


class GrootLBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``."""

    def __init__(self, config: GrootLConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.residual_in_fp32 = config.residual_in_fp32
        self.norm = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = GrootLMixer(config, layer_idx=layer_idx, initialize_mixer_weights=False)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        prompts: Prompts | None = None,
    ) -> tuple[Tensor, Tree | None]:
        """See :class:`~grootvl_mm.language.GrootLMixer`."""
        residual = hidden_states
        hidden_states = self.norm(hidden_states.to(self.norm.weight.dtype))
        if self.residual_in_fp32:
            residual = residual.to(torch.float32)
        hidden_states, tree = self.mixer(hidden_states, cache=cache, attention_mask=attention_mask, prompts=prompts)
        return residual + hidden_states, tree


class GrootLPreTrainedModel(MambaPreTrainedModel):
    """Base class: initialization, saving and loading as in Mamba."""

    config: GrootLConfig
    config_class = GrootLConfig
    _no_split_modules = ["GrootLBlock", "GrootLMixer"]


class GrootLModel(GrootLPreTrainedModel):
    """GrootL without a head. Parameters are named as in Mamba, so Mamba checkpoints load unchanged."""

    def __init__(self, config: GrootLConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GrootLBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self._register_load_state_dict_pre_hook(_rename_embeddings)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the tokens."""
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace them."""
        self.embeddings = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_trees: bool = False,
        return_dict: bool | None = None,
    ) -> tuple | GrootLModelOutput:
        """Compute the hidden states.

        Args:
            input_ids: (B, L) int64; either these or ``inputs_embeds``.
            attention_mask: (B, L), 0 for padding on either side; with a cache, it may also cover all previous tokens.
            inputs_embeds: (B, L, hidden size).
            prompt_lengths: (B,), length of each sample's prompt, which starts at its first non-padding token and whose
                tokens also see later ones of the prompt. Default: 0, no token sees a later one.
            cache: The ``cache`` of an earlier output, to continue from; updated in place. Only the first call of a text
                has a prompt, so ``prompt_lengths`` must be 0 here.
            use_cache: Return a cache; default: ``config.use_cache`` in evaluation, False in training.
            output_hidden_states: Return the hidden states before each layer and the last ones.
            output_trees: Return the trees of each layer.
            return_dict: Return an output object (default) or a tuple.

        Raises:
            ValueError: Both or neither of ``input_ids`` and ``inputs_embeds`` are given, or ``prompt_lengths`` or
                ``attention_mask`` do not match the tokens.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if return_dict is None:
            return_dict = config.return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if self.gradient_checkpointing and self.training:
            use_cache = False
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        is_continued = cache is not None and cache.has_previous_state()
        if attention_mask is not None:
            batch, length, _ = hidden_states.shape
            if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < length:
                raise ValueError(
                    f"attention_mask must have shape {(batch, length)}, or more columns for earlier tokens, "
                    f"got {tuple(attention_mask.shape)}"
                )
            attention_mask = attention_mask[:, -length:]
        prompts = self._prompts(prompt_lengths, hidden_states, attention_mask, is_continued)
        order = None
        if is_continued and attention_mask is not None:
            # New tokens must directly follow the previous ones, so move the padding to the right.
            attention_mask, order = attention_mask.ne(0).sort(dim=1, descending=True, stable=True)
            hidden_states = take_tokens(hidden_states, order)

        all_hidden_states = () if output_hidden_states else None
        trees = () if output_trees else None
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            hidden_states, tree = layer(hidden_states, cache=cache, attention_mask=attention_mask, prompts=prompts)
            if output_trees:
                trees += (tree,)
        hidden_states = self.norm_f(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)
        if order is not None:
            place = order.argsort(dim=1)
            hidden_states = take_tokens(hidden_states, place)
            if output_hidden_states:
                all_hidden_states = tuple(take_tokens(states, place) for states in all_hidden_states)

        output = GrootLModelOutput(
            last_hidden_state=hidden_states,
            cache=cache if use_cache else None,
            hidden_states=all_hidden_states,
            trees=trees,
        )
        return output if return_dict else output.to_tuple()

    def _prompts(
        self,
        prompt_lengths: Tensor | Sequence[int] | None,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        is_continued: bool,
    ) -> Prompts | None:
        """Locate the prompts; None if no tree differs from the chain."""
        if prompt_lengths is None:
            return None
        prompts = locate_prompts(prompt_lengths, hidden_states, attention_mask)
        if is_continued and prompts.end:
            raise ValueError(
                "with a cache of earlier tokens there is no prompt: prompt_lengths must be 0 or None, got "
                f"{prompts.length.tolist()}"
            )
        has_tree = prompts.end > 0 and self.config.tree == "prompt"
        if self.config.edge_decay == "next":
            has_tree = has_tree and self.config.tree_reach > 1 and int(prompts.length.max()) > 2
        return prompts if has_tree else None


def _rename_embeddings(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Old Mamba checkpoints name the embeddings ``embedding``."""
    if (old := f"{prefix}embedding.weight") in state_dict:
        state_dict[f"{prefix}embeddings.weight"] = state_dict.pop(old)


class GrootLForCausalLM(GrootLPreTrainedModel, GenerationMixin):
    """GrootL with a language modeling head, tied to the embeddings by default."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: GrootLConfig) -> None:
        super().__init__(config)
        self.backbone = GrootLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the tokens."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace them."""
        self.backbone.set_input_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_trees: bool = False,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> tuple | GrootLCausalLMOutput:
        """Predict the next token at each position, and compute the loss.

        Args:
            input_ids: (B, L) int64; either these or ``inputs_embeds``.
            attention_mask: (B, L), 0 for padding on either side; with a cache, it may also cover all previous tokens.
            inputs_embeds: (B, L, hidden size).
            prompt_lengths: (B,), see :class:`GrootLModel`. Logits inside a prompt have seen the tokens that they
                predict; from the last token of the prompt on, they are causal. Default: the tokens before the first one
                with a label, or 0 (strictly causal) without labels.
            labels: (B, L), the token ids, or -100 for tokens without loss. They are shifted internally.
            cache: The ``cache`` of an earlier output, to continue from; updated in place.
            use_cache: Return a cache; default: ``config.use_cache`` in evaluation, False in training.
            output_hidden_states: Return the hidden states before each layer and the last ones.
            output_trees: Return the trees of each layer.
            return_dict: Return an output object (default) or a tuple.
            logits_to_keep: Compute only this many of the last logits, or those at these positions; 0 for all.
            **kwargs: Arguments of the loss, such as ``num_items_in_batch``.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        is_continued = cache is not None and cache.has_previous_state()
        if prompt_lengths is None and labels is not None and not is_continued:
            prompt_lengths = prompt_lengths_of_labels(labels, attention_mask)
        output = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            prompt_lengths=prompt_lengths,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_trees=output_trees,
            return_dict=True,
        )
        hidden_states = slice_logits_to_keep(output.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states.to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = GrootLCausalLMOutput(
            loss=loss, logits=logits, cache=output.cache, hidden_states=output.hidden_states, trees=output.trees
        )
        return output if return_dict else output.to_tuple()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate text, see ``GenerationMixin.generate``.

        By default the whole input is the prompt, unless it continues earlier tokens in a ``cache``.
        """
        if kwargs.get("prompt_lengths") is None:
            kwargs["prompt_lengths"] = self._input_lengths(inputs, kwargs)
        elif not isinstance(kwargs["prompt_lengths"], Tensor):  # generate() expands tensors to the number of beams
            kwargs["prompt_lengths"] = torch.as_tensor(kwargs["prompt_lengths"])
        return super().generate(inputs, *args, **kwargs)

    def _input_lengths(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The number of tokens of each input sample, or None if they continue a cache."""
        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        given = next((value for value in given if value is not None), None)
        cache = kwargs.get("cache")
        if given is None or (cache is not None and cache.has_previous_state()):
            return None
        mask = kwargs.get("attention_mask")
        if mask is None and given.dim() == 2:
            # As in generate(): padding tokens are padding unless they are also end-of-sequence tokens.
            settings = kwargs.get("generation_config") or self.generation_config
            padding, end = (kwargs.get(name, getattr(settings, name)) for name in ("pad_token_id", "eos_token_id"))
            if padding is not None and padding not in (end if isinstance(end, list) else [end]):
                mask = given != padding
        return torch.full((len(given),), given.shape[1], device=given.device) if mask is None else mask.bool().sum(1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass; the prompt is passed to the first one, or to all without a cache."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            cache=cache,
            attention_mask=attention_mask,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if cache is None or not cache.has_previous_state():
            inputs["prompt_lengths"] = prompt_lengths
        elif not is_first_iteration:
            inputs["attention_mask"] = None  # generated tokens are not padding
        return inputs
