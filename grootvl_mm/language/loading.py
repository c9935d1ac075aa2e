"""Loads what fine-tuning leaves: a model, or an adapter with the model that it belongs to."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grootvl_mm.language.configuration import GrootLConfig
from grootvl_mm.language.modeling import GrootLForCausalLM

ADAPTER = "adapter_config.json"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return (Path(path) / ADAPTER).is_file()


def base_of(adapter: str | Path) -> str:
    """Folder or hub name of the model that an adapter was trained for."""
    return json.loads((Path(adapter) / ADAPTER).read_text())["base_model_name_or_path"]


def load_config(path: str | Path, **settings: Any) -> GrootLConfig:
    """The configuration of a GrootL or Mamba model with some fields changed, and checked as a whole.

    Args:
        path: Folder or hub name of a model, or folder of an adapter.
        **settings: Fields of :class:`~grootvl_mm.language.GrootLConfig`.

    Raises:
        TypeError: A setting is no such field.
        ValueError: The settings do not go together.
    """
    # An adapter keeps the configuration with which it was trained: that of its base may be a Mamba's, without trees.
    if is_adapter(path) and not (Path(path) / "config.json").is_file():
        path = base_of(path)
    config = GrootLConfig.from_pretrained(path)
    if not settings:
        return config
    fields = config.to_dict()
    if unknown := sorted(settings.keys() - fields.keys()):
        raise TypeError(f"{', '.join(map(repr, unknown))}: no fields of GrootLConfig")
    name = config.name_or_path
    config = GrootLConfig(**{**fields, **settings})
    config.name_or_path = name
    return config


def load_model(path: str | Path, base: str | None = None, **settings: Any) -> PreTrainedModel:
    """Load a model, or an adapter upon its model, for evaluation.

    Args:
        path: Folder or hub name of a GrootL or Mamba model, or folder of an adapter.
        base: Model of the adapter, if it has moved since.
        **settings: Fields of :class:`~grootvl_mm.language.GrootLConfig` to change, such as ``tree_scale``.
    """
    config = load_config(path, **settings)
    if not is_adapter(path):
        return GrootLForCausalLM.from_pretrained(path, config=config).eval()
    from peft import PeftModel

    model = GrootLForCausalLM.from_pretrained(base or base_of(path), config=config)
    return PeftModel.from_pretrained(model, path).eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or adapter; it pads with its end-of-sequence token if it has no token for that.

    The attention mask and the labels tell padding from the end of a text, so the embedding needs no further row.
    """
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
