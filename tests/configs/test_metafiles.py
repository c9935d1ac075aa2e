"""The model index: complete, true to the configs and models, and readable for ``mim search``."""

import pytest
import yaml
from modelindex.load_model_index import load

from tests.configs.config_cases import CONFIG_FILES, ROOT, build_model, load_config

IN1K = "ImageNet-1k"
PAPER = {
    ("grootv-tiny_8xb128_in1k", IN1K, "Top 1 Accuracy"): 83.4,
    ("grootv-small_8xb128_in1k", IN1K, "Top 1 Accuracy"): 84.2,
    ("grootv-base_8xb128_in1k", IN1K, "Top 1 Accuracy"): 84.8,
    ("mask-rcnn_grootv-tiny_fpn_1x_coco", "COCO", "box AP"): 47.0,
    ("mask-rcnn_grootv-tiny_fpn_1x_coco", "COCO", "mask AP"): 42.7,
    ("mask-rcnn_grootv-tiny_fpn_3x_coco", "COCO", "box AP"): 49.0,
    ("mask-rcnn_grootv-tiny_fpn_3x_coco", "COCO", "mask AP"): 43.8,
    ("mask-rcnn_grootv-small_fpn_1x_coco", "COCO", "box AP"): 48.6,
    ("mask-rcnn_grootv-small_fpn_1x_coco", "COCO", "mask AP"): 43.6,
    ("mask-rcnn_grootv-small_fpn_3x_coco", "COCO", "box AP"): 50.1,
    ("mask-rcnn_grootv-small_fpn_3x_coco", "COCO", "mask AP"): 44.6,
    ("grootv-tiny_upernet_8xb2-160k_ade20k-512x512", "ADE20K", "mIoU"): 48.5,
    ("grootv-tiny_upernet_8xb2-160k_ade20k-512x512", "ADE20K", "mIoU(ms+flip)"): 49.4,
    ("grootv-small_upernet_8xb2-160k_ade20k-512x512", "ADE20K", "mIoU"): 50.7,
    ("grootv-small_upernet_8xb2-160k_ade20k-512x512", "ADE20K", "mIoU(ms+flip)"): 51.7,
}


@pytest.fixture(scope="module")
def models():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    return [model for metafile in index["Import"] for model in yaml.safe_load((ROOT / metafile).read_text())["Models"]]


def test_every_config_has_one_entry_and_every_entry_its_config(models):
    assert sorted(model["Config"] for model in models) == sorted(
        path.relative_to(ROOT).as_posix() for path in CONFIG_FILES
    )
    for model in models:
        assert model["Config"].endswith(f"/{model['Name']}.py")


def test_every_metafile_is_imported():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    found = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("metafile.yml")]
    assert sorted(index["Import"]) == sorted(found)


def test_results_are_the_papers_and_say_so(models):
    stated = {
        (model["Name"], result["Dataset"], metric): value
        for model in models
        for result in model.get("Results", [])
        for metric, value in result["Metrics"].items()
    }
    assert stated == PAPER
    for model in models:
        source = model["Metadata"].get("Results Source")
        assert source == ("paper (arXiv 2406.02395)" if "Results" in model else None), model["Name"]
        assert "Weights" not in model


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_built_model(path, models):
    (metadata,) = [model["Metadata"] for model in models if model["Name"] == path.stem]
    built = sum(parameter.numel() for parameter in build_model(load_config(path), init=False).parameters())
    assert metadata["Parameters"] == built
    assert isinstance(metadata.get("FLOPs", 0), int)


def test_batch_sizes_and_lengths_are_those_of_the_configs(models):
    for model in models:
        cfg, metadata = load_config(ROOT / model["Config"]), model["Metadata"]
        devices = 1 if "/demo/" in model["Config"] else 8
        assert metadata["Batch Size"] == devices * cfg.train_dataloader.batch_size, model["Name"]
        if "Epochs" in metadata:
            assert metadata["Epochs"] == cfg.train_cfg.max_epochs, model["Name"]
        else:
            assert metadata["Iterations"] == cfg.train_cfg.max_iters, model["Name"]


def test_mim_search_reads_the_index():
    search = pytest.importorskip("mim.commands.search")
    table = search.convert2df(load(str(ROOT / "model-index.yml")))
    assert sorted(table.index) == sorted(path.stem for path in CONFIG_FILES)
    assert set(table["model"]) == {"grootv"}
    assert table.loc["grootv-tiny_8xb128_in1k", "imagenet-1k/top_1_accuracy"] == 83.4
    found = search.filter_by_conditions(table, "parameters>80000000")
    assert sorted(found.index) == ["grootv-base_8xb128_in1k", "grootv-small_upernet_8xb2-160k_ade20k-512x512"]
