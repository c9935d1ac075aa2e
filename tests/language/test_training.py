"""Recipes, and trainings that are interrupted."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

pytest.importorskip("transformers")

from transformers import MambaConfig, MambaForCausalLM, Trainer

from grootvl_mm.language import GrootLForCausalLM
from grootvl_mm.language.data import DataError
from grootvl_mm.language.loading import load_config, load_model, load_tokenizer
from grootvl_mm.language.training import RecipeError, build_model, build_trainer, find_resumable_checkpoint
from tests.helpers.crafted_pickles import HOSTILE, write
from tests.helpers.language import make_tokenizer, save_base, words
from tests.helpers.marks import needs_safe_globals
from tests.helpers.tool_runs import ROOT

CONFIGS = sorted((ROOT / "configs" / "language").glob("*.py"))
LORA = {"targets": "default", "r": 2, "lora_alpha": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without trees and data."""
    folder = tmp_path_factory.mktemp("language")
    save_base(folder / "base", tree_scale=0.0)
    records = [{"instruction": words(4 + i % 7, i), "output": words(1 + i % 3, 2 * i)} for i in range(12)]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def recipe(folder: Path, **parts: object) -> Config:
    """A training of six steps."""
    trainer = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 1, "use_cpu": True}
    return Config(
        {
            "model": {"pretrained": str(folder / "base"), "tree_scale": 0.3},
            "data": {
                "train": str(folder / "train.json"),
                "max_length": 64,
                "template": {"without_input": "{instruction}"},
            },
            "trainer": {**trainer, "save_steps": 2, "disable_tqdm": True},
            **parts,
        }
    )


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The work dir of a whole training with an adapter."""
    trainer = build_trainer(recipe(folder, lora=LORA), folder / "lora")
    trainer.train()
    trainer.save_model()
    return folder / "lora"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_recipes_train_what_they_say(path: Path, folder: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({"model.pretrained": str(folder / "base"), "data.train": str(folder / "train.json")})
    cfg.merge_from_dict({"trainer.max_steps": 2, "trainer.use_cpu": True, "trainer.gradient_accumulation_steps": 1})
    if "val" in cfg.data:
        cfg.data.val = cfg.data.train
    trainer = build_trainer(cfg, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.training_loss > 0
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora" in name for name in moved) == (cfg.get("lora") is not None)


def test_trees_reach_the_training(folder: Path, tmp_path: Path) -> None:
    losses = {}
    for scale in (0.0, 0.3):
        cfg = recipe(folder, model={"pretrained": str(folder / "base"), "tree_scale": scale})
        trainer = build_trainer(cfg, tmp_path)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
        losses[scale] = trainer.compute_loss(trainer.model, batch).item()
    assert losses[0.0] != pytest.approx(losses[0.3], abs=1e-3)


def test_mamba_and_random_models_build(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    mamba = MambaForCausalLM(MambaConfig(vocab_size=42, hidden_size=16, num_hidden_layers=1))
    mamba.save_pretrained(tmp_path)
    model = build_model({"pretrained": str(tmp_path), "tree_reach": 2}, tokenizer)
    assert isinstance(model, GrootLForCausalLM)
    assert (model.config.tree_scale, model.config.tree_reach) == (0.3, 2)
    torch.testing.assert_close(model.backbone.embeddings.weight, mamba.backbone.embeddings.weight)
    model = build_model({"tokenizer": str(folder / "base"), "hidden_size": 8, "num_hidden_layers": 1}, tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": None}, "it has no 'model'"),
        ({"model": {"tree_scale": 1.0}}, "neither 'pretrained' nor 'tokenizer'"),
        ({"data": {"val": "a.json"}}, "data has no 'train'"),
        ({"trainer": {"max_step": 3}}, "trainer: .*'max_step'.*TrainingArguments"),
    ],
)
def test_wrong_recipes_are_named(parts: dict, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        build_trainer(recipe(folder, **parts), tmp_path)


def test_wrong_settings_are_named(folder: Path, tmp_path: Path) -> None:
    cfg = recipe(folder)
    cfg.model.tree_scales = 1
    with pytest.raises(RecipeError, match=r"'tree_scales'.*see GrootLConfig"):
        build_trainer(cfg, tmp_path)
    cfg = recipe(folder)
    cfg.data.max_len = 1
    with pytest.raises(RecipeError, match=r"data: .*'max_len'"):
        build_trainer(cfg, tmp_path)
    cfg = recipe(folder)
    cfg.data.train = str(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot read .*none\.json"):
        build_trainer(cfg, tmp_path)


def test_adapter_knows_its_trees(folder: Path, trained: Path) -> None:
    """Its base is a model without trees."""
    assert load_config(folder / "base").tree_scale == 0
    for path in (trained, trained / "checkpoint-4"):
        model = load_model(path)
        assert model.config.tree_scale == 0.3
        assert {parameter.requires_grad for parameter in model.parameters()} == {False}
    assert load_tokenizer(trained).pad_token_id == 0
    assert load_model(trained, tree_scale=0.0).config.tree_scale == 0
    with pytest.raises(TypeError, match="GrootLConfig has no field 'scale'"):
        load_model(trained, scale=0.0)


def test_interrupted_training_ends_like_a_whole_one(folder: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    found = find_resumable_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-4"
    trainer = build_trainer(recipe(folder, lora=LORA), tmp_path)
    assert type(trainer) is Trainer  # anybody's can resume
    trainer.train(resume_from_checkpoint=str(found))
    trainer.save_model()
    ids = torch.tensor([make_tokenizer()(words(9))["input_ids"]])
    logits = [load_model(path)(ids, prompt_lengths=torch.tensor([6])).logits for path in (trained, tmp_path)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


@needs_safe_globals
def test_states_of_random_generators_hold_numbers_only(folder: Path, tmp_path: Path) -> None:
    """The Trainer allows NumPy's own types while it reads them, by which a file could forge objects."""
    trainer = build_trainer(recipe(folder), tmp_path)
    for name in [name for name in HOSTILE if name.startswith("array of objects")]:
        write(tmp_path / "rng_state.pth", {"python": (3, (), None), "numpy": HOSTILE[name]()})
        with pytest.raises(pickle.UnpicklingError):
            trainer._load_rng_state(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("trainer_state.json", None),  # written last
        ("trainer_state.json", 20),
        ("optimizer.pt", None),
        ("optimizer.pt", 200),
        ("scheduler.pt", 0),
        ("rng_state.pth", 100),
        ("adapter_model.safetensors", None),
        ("adapter_model.safetensors", 300),
    ],
)
def test_incomplete_checkpoints_are_passed_over(name: str, size: int | None, trained: Path, tmp_path: Path) -> None:
    for step in (2, 6):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert find_resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    path = tmp_path / "checkpoint-6" / name
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        assert size < len(content)
        path.write_bytes(content[:size])
    assert find_resumable_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert find_resumable_checkpoint(tmp_path / "none") is None
