"""Fine-tuning with Hugging Face's Trainer, configured by an mmengine config.

A recipe has these parts, see ``configs/language`` for complete ones::

    model = dict(pretrained="FOLDER or hub name", tree_scale=0.3)     # and any other field of GrootLConfig
    lora = dict(targets="default", r=8, lora_alpha=16)                # None: train all parameters
    data = dict(train="train.json", val=None, max_length=2048)
    trainer = dict(learning_rate=2e-5, num_train_epochs=1)            # any of transformers.TrainingArguments

Without ``pretrained``, the weights are random: ``model = dict(tokenizer="FOLDER", hidden_size=96, ...)``.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

from grootvl_mm.language.configuration import GrootLConfig
from grootvl_mm.language.data import InstructionDataset, PromptCollator, PromptTemplate, read_records
from grootvl_mm.language.loading import load_config, load_tokenizer
from grootvl_mm.language.lora import add_lora
from grootvl_mm.language.modeling import GrootLForCausalLM

PARTS = {
    "model": "the model, as dict(pretrained=...) or dict(tokenizer=..., hidden_size=..., ...)",
    "data": "the data, as dict(train=FILE)",
    "trainer": "arguments of transformers.TrainingArguments",
}


class RecipeError(ValueError):
    """An invalid recipe; the message says what was found and what was expected."""


def check_recipe(cfg: Config, source: str) -> None:
    """Raise a RecipeError if a config lacks a part."""
    for name, meaning in PARTS.items():
        if not isinstance(cfg.get(name), Mapping):
            raise RecipeError(
                f"{source} is not a recipe for fine-tuning a language model: it has no {name!r} ({meaning}); see "
                "configs/language for examples"
            )


def build_tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe's model."""
    source = model.get("tokenizer") or model.get("pretrained")
    if source is None:
        raise RecipeError("the model has neither 'pretrained' nor 'tokenizer'; set one of them to a folder or hub name")
    return load_tokenizer(source)


def build_model(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> GrootLForCausalLM:
    """Build the model of a recipe, with pretrained weights if the recipe has any."""
    settings = {key: value for key, value in model.items() if key not in ("pretrained", "tokenizer")}
    try:
        if pretrained := model.get("pretrained"):
            return GrootLForCausalLM.from_pretrained(pretrained, config=load_config(pretrained, **settings))
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return GrootLForCausalLM(GrootLConfig(**{"vocab_size": len(tokenizer), **special, **settings}))
    except TypeError as error:
        raise RecipeError(f"model: {error}; see GrootLConfig for the valid fields") from None


def build_dataset(path: str, data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> InstructionDataset:
    """Build a dataset from a file, with ``max_length``, ``template`` and ``overlong`` of a recipe's data."""
    settings = {key: value for key, value in data.items() if key not in ("train", "val", "padding_side")}
    if "template" in settings:
        settings["template"] = PromptTemplate(**settings["template"])
    try:
        return InstructionDataset(read_records(path), tokenizer, source=str(path), **settings)
    except TypeError as error:
        raise RecipeError(f"data: {error}; expected train, val, max_length, template, overlong, padding_side") from None


def build_arguments(trainer: Mapping[str, Any], work_dir: str | Path) -> TrainingArguments:
    """Build the Trainer's arguments, with the settings that GrootL needs."""
    try:
        return TrainingArguments(
            **{
                "output_dir": str(work_dir),
                "report_to": "none",
                **trainer,
                "remove_unused_columns": False,  # keeps prompt_length
                "label_names": ["labels"],
            }
        )
    except TypeError as error:
        raise RecipeError(f"trainer: {error}; expected arguments of transformers.TrainingArguments") from None


class KeepConfig(TrainerCallback):
    """Saves the model's configuration with each adapter, because adapters do not store the options of the trees."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Add the configuration to a checkpoint."""
        if state.is_world_process_zero:
            model.config.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Add the configuration to the work dir."""
        if state.is_world_process_zero:
            model.config.save_pretrained(args.output_dir)


def make_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    train: Dataset,
    val: Dataset | None = None,
    padding_side: str = "right",
) -> Trainer:
    """Build a Trainer for examples like those of :class:`~grootvl_mm.language.data.InstructionDataset`."""
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=val,
        data_collator=PromptCollator(pad_token_id, padding_side),
        processing_class=tokenizer,
        callbacks=[KeepConfig()],
    )


def build_trainer(cfg: Config, work_dir: str | Path) -> Trainer:
    """Build the Trainer of a recipe, with its model and data.

    Raises:
        RecipeError: The recipe is invalid.
        DataError: The data are invalid.
    """
    check_recipe(cfg, str(cfg.filename or "the config"))
    arguments = build_arguments(cfg.trainer.to_dict(), work_dir)
    set_seed(arguments.seed)  # the Trainer would do it only after the adapters have been initialized
    tokenizer = build_tokenizer(cfg.model)
    data = cfg.data.to_dict()
    if "train" not in data:
        raise RecipeError("data has no 'train'; set it to a file in Alpaca format")
    train = build_dataset(data["train"], data, tokenizer)
    val = build_dataset(data["val"], data, tokenizer) if data.get("val") else None
    model = build_model(cfg.model.to_dict(), tokenizer)
    if cfg.get("lora") is not None:
        model = add_lora(model, **cfg.lora.to_dict())
    return make_trainer(model, tokenizer, arguments, train, val, data.get("padding_side", "right"))


def find_resumable_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a Trainer's work dir, or None if there is none.

    The Trainer writes the files of a checkpoint in place, one after the other. If the process is killed meanwhile, some
    are missing or truncated; such a checkpoint is skipped.
    """
    found = [path for path in Path(work_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    newest_first = sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    return next((path for path in newest_first if is_complete(path)), None)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a Trainer can resume from a checkpoint: all its files exist and are complete."""
    checkpoint = Path(checkpoint)
    weights = [
        path for pattern in ("model*.safetensors", "adapter_model.safetensors") for path in checkpoint.glob(pattern)
    ]
    states = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
    states += checkpoint.glob("rng_state*.pth")
    if not weights or len(states) < 3:
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError):
        return False
    # Both formats reveal truncation: safetensors by the size in its header, zip by the directory at its end.
    return all(map(_is_whole_safetensors, weights)) and all(map(zipfile.is_zipfile, states))


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
