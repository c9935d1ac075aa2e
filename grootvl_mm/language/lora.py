"""LoRA fine-tuning of GrootL with peft: target modules, and a merge that is correct for tied embeddings."""

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
    """The paper's LoRA settings: rank 8, alpha 16 and no dropout.

    Args:
        targets: ``default``, all projections; ``published``, also the embeddings, as in the authors' code; or names of
            modules. The head is tied to the embeddings but not to their adapters, so that after training with adapted
            embeddings, the weights of head and embeddings differ, see :func:`merge_lora`.
        **options: Arguments of ``peft.LoraConfig``.

    Raises:
        ValueError: ``targets`` is an unknown name.
    """
    if isinstance(targets, str):
        if targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)}, or a list of module names, got {targets!r}")
        targets = TARGETS[targets]
    recipe = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "task_type": TaskType.CAUSAL_LM}
    return LoraConfig(target_modules=list(targets), **(recipe | options))


def add_lora(model: PreTrainedModel, targets: str | Sequence[str] = "default", **options: Any) -> PeftModel:
    """Add adapters to a model and freeze all other parameters; for the arguments, see :func:`lora_config`."""
    return get_peft_model(model, lora_config(targets, **options))


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merge the adapters into the weights; the logits stay the same.

    peft's ``merge_and_unload`` changes the logits if the embeddings are adapted: it modifies their weights in place,
    and with them the tied head, which was trained without the adapter. Here, the head is untied first and
    ``config.tie_word_embeddings`` set to False, so that the model is also the same after saving and loading. Weights
    without adapters stay tied.

    Args:
        model: A model with adapters; do not use it afterwards.

    Raises:
        TypeError: The model has no adapters.
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
    """The layer inside peft's adapters."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
