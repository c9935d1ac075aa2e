"""Fine-tuning GrootL by LoRA with peft: which modules get adapters, and a merge that keeps what was trained."""

from collections.abc import Sequence
from typing import Any

try:
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model
except ImportError as error:
    raise ImportError(
        "grootvl_mm.language.lora needs peft, which is not installed: pip install 'grootvl_mm[language]'"
    ) from error
from torch import nn
from transformers import PreTrainedModel

TARGETS = {
    "default": ("in_proj", "x_proj", "out_proj"),
    "published": ("x_proj", "embeddings", "in_proj", "out_proj"),
}


def lora_config(targets: str | Sequence[str] = "default", **options: Any) -> LoraConfig:
    """Settings of LoRA for GrootL: rank 8, alpha 16 and no dropout, as the paper trains it.

    Args:
        targets: ``default``, all projections; ``published``, also the embeddings, as the authors do it; or names of
            modules. The head shares the weights of the embeddings, but not their adapters: a model that is trained
            with adapted embeddings has other weights in its head than in its embeddings, see :func:`merge_lora`.
        **options: of ``peft.LoraConfig``.

    Raises:
        ValueError: unknown targets.
    """
    if isinstance(targets, str):
        if targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)} or names of modules, got {targets!r}")
        targets = TARGETS[targets]
    recipe = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": TaskType.CAUSAL_LM}
    return LoraConfig(target_modules=list(targets), **(recipe | options))


def add_lora(model: PreTrainedModel, targets: str | Sequence[str] = "default", **options: Any) -> PeftModel:
    """The model with fresh adapters, which alone are trained; arguments as for :func:`lora_config`."""
    return get_peft_model(model, lora_config(targets, **options))


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """The model without adapters, whose weights contain them; it gives the same logits.

    ``merge_and_unload`` of peft does not where the embeddings are adapted: it changes the weights in place, and with
    them those of the head, which shares them and was trained without that change. Here the head first gets weights of
    its own, and ``config.tie_word_embeddings`` becomes False, so that the model also stays as it is when it is saved
    and loaded again. Weights that no adapter changes remain shared.

    Args:
        model: with adapters; it is used up.

    Raises:
        TypeError: a model without adapters.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a peft.PeftModel, got {type(model).__name__}")
    base = model.get_base_model()
    embeddings, head = (_base_layer(module) for module in (base.get_input_embeddings(), base.get_output_embeddings()))
    is_adapted = embeddings is not base.get_input_embeddings() or head is not base.get_output_embeddings()
    if is_adapted and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    merged = model.merge_and_unload()
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False
        merged.tie_weights()
        merged.all_tied_weights_keys = merged.get_expanded_tied_weights_keys(all_submodels=True)
    return merged


def _base_layer(module: nn.Module) -> nn.Module:
    """The layer below the adapters of peft."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
