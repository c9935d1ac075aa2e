"""Fine-tuning by Hugging Face's Trainer, described by a config of mmengine.

A recipe has these parts; ``configs/language`` holds complete ones::

    model = dict(pretrained="FOLDER or hub name", tree_scale=0.3)     # and any other field of GrootLConfig
    lora = dict(targets="default", r=8, lora_alpha=16)                # None: train all parameters
    data = dict(train="train.json", val=None, max_length=2048)
    trainer = dict(learning_rate=2e-5, num_train_epochs=1)            # any of transformers.TrainingArguments

Without ``pretrained``, the model starts at random: ``model = dict(tokenizer="FOLDER", hidden_size=96, ...)``.
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
from grootvl_mm.utils.safe_checkpoints import without_stand_ins

PARTS = {
    "model": "the model, as dict(pretrained=...) or dict(tokenizer=..., hidden_size=..., ...)",
    "data": "the data, as dict(train=FILE)",
    "trainer": "arguments of transformers.TrainingArguments",
}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says what came and what was expected."""


def check_recipe(cfg: Config, source: str) -> None:
    """Raise RecipeError if a config lacks a part."""
    for name, meaning in PARTS.items():
        if not isinstance(cfg.get(name), Mapping):
            raise RecipeError(
                f"{source} is no recipe for fine-tuning a language model: it has no {name!r} ({meaning}); "
                "see configs/language for complete ones"
            )


def build_tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe's model."""
    source = model.get("tokenizer") or model.get("pretrained")
    if source is None:
        raise RecipeError(
            "the model has neither 'pretrained' nor 'tokenizer'; expected a folder or hub name in one of them"
        )
    return load_tokenizer(source)


def build_model(model: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> GrootLForCausalLM:
    """The model of a recipe, with pretrained weights if it names some."""
    settings = {key: value for key, value in model.items() if key not in ("pretrained", "tokenizer")}
    try:
        if pretrained := model.get("pretrained"):
            return GrootLForCausalLM.from_pretrained(pretrained, config=load_config(pretrained, **settings))
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return GrootLForCausalLM(GrootLConfig(**{"vocab_size": len(tokenizer), **special, **settings}))
    except TypeError as error:
        raise RecipeError(f"the model has {error}; expected fields of GrootLConfig") from None


def build_dataset(path: str, data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> InstructionDataset:
    """The examples of a file, by the settings ``max_length``, ``template`` and ``overlong`` of a recipe's data."""
    settings = {key: value for key, value in data.items() if key not in ("train", "val", "padding_side")}
    if "template" in settings:
        settings["template"] = PromptTemplate(**settings["template"])
    try:
        return InstructionDataset(read_records(path), tokenizer, source=str(path), **settings)
    except TypeError as error:
        raise RecipeError(
            f"the data: {error}; expected train, val, max_length, template, overlong, padding_side"
        ) from None


def build_arguments(trainer: Mapping[str, Any], work_dir: str | Path) -> TrainingArguments:
    """The arguments of the Trainer, with defaults that GrootL needs."""
    try:
        return TrainingArguments(
            **{
                "output_dir": str(work_dir),
                "report_to": "none",
                **trainer,
                "remove_unused_columns": False,  # prompt_lengths reach the model
                "label_names": ["labels"],
            }
        )
    except TypeError as error:
        raise RecipeError(f"the trainer: {error}; expected arguments of transformers.TrainingArguments") from None


class KeepConfig(TrainerCallback):
    """Puts the configuration of the model beside each adapter, which otherwise does not know its trees."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Complete a checkpoint."""
        if state.is_world_process_zero:
            model.config.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Complete the work dir."""
        if state.is_world_process_zero:
            model.config.save_pretrained(args.output_dir)


class ResumableTrainer(Trainer):
    """A Trainer that reads its own checkpoints beside the stand-ins by which this package reads those of mmengine."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with without_stand_ins():
            super()._load_rng_state(checkpoint)


def make_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    train: Dataset,
    val: Dataset | None = None,
    padding_side: str = "right",
) -> Trainer:
    """A Trainer of examples as :class:`~grootvl_mm.language.data.InstructionDataset` has them."""
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return ResumableTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=val,
        data_collator=PromptCollator(pad_token_id, padding_side),
        processing_class=tokenizer,
        callbacks=[KeepConfig()],
    )


def build_trainer(cfg: Config, work_dir: str | Path) -> Trainer:
    """Everything of a recipe, ready to train.

    Raises:
        RecipeError: The recipe is wrong.
        DataError: The data are.
    """
    check_recipe(cfg, str(cfg.filename or "the config"))
    arguments = build_arguments(cfg.trainer.to_dict(), work_dir)
    set_seed(arguments.seed)  # the Trainer does it after the adapters have got their random weights
    tokenizer = build_tokenizer(cfg.model)
    data = cfg.data.to_dict()
    if "train" not in data:
        raise RecipeError("the data have no 'train'; expected a file in Alpaca's format")
    train = build_dataset(data["train"], data, tokenizer)
    val = build_dataset(data["val"], data, tokenizer) if data.get("val") else None
    model = build_model(cfg.model.to_dict(), tokenizer)
    if cfg.get("lora") is not None:
        model = add_lora(model, **cfg.lora.to_dict())
    return make_trainer(model, tokenizer, arguments, train, val, data.get("padding_side", "right"))


def find_resumable_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a Trainer's work dir, or None if there is none.

    The Trainer writes a checkpoint's files in place, one after the other. Of a process that was killed meanwhile some
    are missing or cut off; such a checkpoint is passed over.
    """
    found = [path for path in Path(work_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    newest_first = sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    return next((path for path in newest_first if is_complete(path)), None)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a Trainer could go on from a checkpoint: all of its files are there and whole."""
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
    # Both formats tell a file that was cut off: one by a size in its header, the other by a directory at its end.
    return all(map(_is_whole_safetensors, weights)) and all(map(zipfile.is_zipfile, states))


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
