"""Loads the results of fine-tuning: a model, or an adapter with its base model."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grootvl_mm.language.configuration import GrootLConfig
from grootvl_mm.language.modeling import GrootLForCausalLM

ADAPTER = "adapter_config.json"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(path) / ADAPTER).is_file()


def base_of(adapter: str | Path) -> str:
    """Folder or hub name of an adapter's base model."""
    return json.loads((Path(adapter) / ADAPTER).read_text())["base_model_name_or_path"]


def load_config(path: str | Path, **settings: Any) -> GrootLConfig:
    """Load the configuration of a GrootL or Mamba model and change some of its fields.

    Args:
        path: Folder or hub name of a model, or folder of an adapter.
        **settings: Fields of :class:`~grootvl_mm.language.GrootLConfig` to change.

    Raises:
        TypeError: A setting is not a field of the configuration.
        ValueError: The settings are inconsistent.
    """
    # An adapter is stored with the configuration that it was trained with; its base may be a Mamba, without trees.
    if is_adapter(path) and not (Path(path) / "config.json").is_file():
        path = base_of(path)
    config = GrootLConfig.from_pretrained(path)
    if not settings:
        return config
    fields = config.to_dict()
    if unknown := sorted(settings.keys() - fields.keys()):
        raise TypeError(f"GrootLConfig has no field {', '.join(map(repr, unknown))}")
    name = config.name_or_path
    config = GrootLConfig(**{**fields, **settings})
    config.name_or_path = name
    return config


def load_model(path: str | Path, base: str | None = None, **settings: Any) -> PreTrainedModel:
    """Load a model, or an adapter with its base model, in evaluation mode.

    Args:
        path: Folder or hub name of a GrootL or Mamba model, or folder of an adapter.
        base: Base model of the adapter, if it is not where it was in training.
        **settings: Fields of :class:`~grootvl_mm.language.GrootLConfig` to change, such as ``tree_scale``.
    """
    config = load_config(path, **settings)
    if not is_adapter(path):
        return GrootLForCausalLM.from_pretrained(path, config=config).eval()
    from peft import PeftModel

    model = GrootLForCausalLM.from_pretrained(base or base_of(path), config=config)
    return PeftModel.from_pretrained(model, path).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or adapter; without a padding token, it pads with the end-of-sequence token.

    The attention mask and the labels distinguish padding from the end of a text, so no new embedding is needed.
    """
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
