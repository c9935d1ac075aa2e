"""GrootLConfig: defaults, errors, and the files of Mamba."""

import logging
from pathlib import Path

import pytest
from transformers import AutoConfig, MambaConfig, RwkvConfig

from grootvl_mm.language import GrootLConfig


def test_defaults_are_published() -> None:
    config = GrootLConfig()
    assert (config.model_type, config.tree, config.tree_scale) == ("grootl", "prompt", 0.3)
    assert (config.tree_reach, config.edge_decay) == (3, "next")
    mamba = MambaConfig().to_dict()
    ours = config.to_dict()
    assert {name: ours[name] for name in mamba if name != "model_type"} == {
        name: value for name, value in mamba.items() if name != "model_type"
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tree": "star"}, "tree must be one of prompt, causal, got 'star'"),
        ({"edge_decay": "other"}, "edge_decay must be one of next, own, got 'other'"),
        ({"tree_reach": 0}, "tree_reach must be at least 1, got 0"),
        ({"tree_scale": float("nan")}, "tree_scale must be finite, got nan"),
        ({"tree": "causal", "tree_scale": 0.3}, "tree_scale must be None, got 0.3"),
        ({"tree": "causal", "edge_decay": "own"}, "needs edge_decay='next', got 'own'"),
    ],
)
def test_wrong_arguments(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrootLConfig(**wrong)


@pytest.mark.parametrize("config", [GrootLConfig(tree_scale=0.5, edge_decay="own"), GrootLConfig(tree="causal")])
def test_round_trip(config: GrootLConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GrootLConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_files_of_mamba_are_taken_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    MambaConfig(hidden_size=48).save_pretrained(tmp_path)
    config = GrootLConfig.from_pretrained(tmp_path, tree_reach=2)
    assert (config.model_type, config.hidden_size, config.tree_reach) == ("grootl", 48, 2)
    assert not caplog.records
    RwkvConfig.from_pretrained(tmp_path)
    assert "using a model of type `mamba`" in caplog.text
    causal = GrootLConfig.from_pretrained(tmp_path, tree="causal", tree_scale=None)
    assert causal.tree_scale is None
