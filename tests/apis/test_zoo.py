"""The zoo by name, for the hosts' APIs."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DefaultScope

from grootvl_mm.apis import zoo
from tests.helpers.config_cases import CONFIG_FILES

NAME = "grootv-pico_demo-cls"


def test_names_are_those_of_the_configs() -> None:
    assert zoo.model_names() == sorted(path.stem for path in CONFIG_FILES)
    for path in CONFIG_FILES:  # installations have copies
        assert Path(zoo.config_file(path.stem)).read_text() == path.read_text()


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"no model 'grootv-tiny_in1k'; similar names: .*grootv-tiny_8xb128_in1k"):
        zoo.config_file("grootv-tiny_in1k")
    with pytest.raises(ValueError, match=r"no model 'x'; grootvl_mm.apis.zoo.model_names\(\) lists all"):
        zoo.config_file("x")


def test_an_installation_without_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo, "PACKAGE", tmp_path / "grootvl_mm")
    zoo._configs.cache_clear()
    with pytest.raises(FileNotFoundError, match="reinstall grootvl_mm"):
        zoo.config_file(NAME)


def test_mmpretrain_knows_our_models_once_they_are_registered() -> None:
    pytest.importorskip("mmpretrain")
    from mmpretrain import FeatureExtractor, ImageClassificationInferencer, get_model, list_models

    zoo.register_in_mmpretrain()
    zoo.register_in_mmpretrain()
    assert set(zoo.model_names()) <= set(list_models())
    assert "resnet50_8xb32_in1k" in list_models()
    assert get_model("grootv-tiny_8xb128_in1k").backbone.channels == 80
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    with DefaultScope.overwrite_default_scope("mmpretrain"):  # other tests may have left another
        (result,) = ImageClassificationInferencer(NAME, pretrained=False)(picture)
        (feature,) = FeatureExtractor(NAME, pretrained=False)(picture, stage="backbone")
    assert len(result["pred_scores"]) == 10
    assert feature[0].shape == (192, 2, 2)
