"""The model zoo: configs, metafiles and tables agree, the results are the paper's, ``mim search`` reads the index."""

import shutil
import sys

import pytest
import yaml
from modelindex.load_model_index import load

from tests.helpers.config_cases import CONFIG_FILES, ROOT
from tests.helpers.tool_runs import load_script

IN1K = "ImageNet-1k"
PAPER = {
    ("grootv-tiny_8xb128_in1k", IN1K, "Top 1 Accuracy"): 83.4,
    ("grootv-small_8xb128_in1k", IN1K, "Top 1 Accuracy"): 84.2,
    ("grootv-base_8xb128_in1k", IN1K, "Top 1 Accuracy"): 84.8,
    ("grootv-tiny_euclidean_8xb128_in1k", IN1K, "Top 1 Accuracy"): 83.2,
    ("grootv-tiny_manhattan_8xb128_in1k", IN1K, "Top 1 Accuracy"): 82.9,
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
CLASSIFIER = "configs/demo/grootv-pico_demo-cls.py"
METAFILE, README = "configs/demo/metafile.yml", "configs/demo/README.md"


@pytest.fixture(scope="module")
def check_zoo():
    for host in ("mmdet", "mmseg", "mmpretrain"):
        pytest.importorskip(host)
    return load_script(".dev_scripts/check_zoo.py")


@pytest.fixture
def zoo(tmp_path):
    """A zoo of the demo classifier alone."""
    demo = tmp_path / "configs" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(ROOT / "configs" / "_base_", tmp_path / "configs" / "_base_")
    shutil.copy(ROOT / CLASSIFIER, demo)
    entries = (ROOT / "configs" / "demo" / "metafile.yml").read_text().split("  - Name: ")
    (entry,) = [entry for entry in entries if entry.startswith("grootv-pico_demo-cls")]
    (demo / "metafile.yml").write_text(f"Models:\n  - Name: {entry}")
    (demo / "README.md").write_text(f"# Demo\n\n<!-- models: begin -->\n<!-- models: end -->\n\n{CLASSIFIER}\n")
    (tmp_path / "model-index.yml").write_text("Import: [configs/demo/metafile.yml]\n")
    return tmp_path


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_configs_metafiles_tables_and_models_agree(check_zoo):
    assert check_zoo.find_problems() == []


def test_fix_writes_tables_and_numbers(check_zoo, zoo):
    metafile, readme = zoo / METAFILE, zoo / README
    replace(metafile, "Parameters: 1130482", "Parameters: 5")
    replace(metafile, "Iterations: 600", "Iterations: 5")
    assert check_zoo.find_problems(zoo) == [
        "configs/demo/metafile.yml, grootv-pico_demo-cls: Parameters must be 1130482, got 5",
        "configs/demo/metafile.yml, grootv-pico_demo-cls: Iterations must be 600, got 5",
        "configs/demo/README.md has an outdated table; --fix updates it",
    ]
    check_zoo.fix(zoo)
    assert check_zoo.find_problems(zoo) == []
    assert "| [grootv-pico_demo-cls](grootv-pico_demo-cls.py) | 600 iterations | 64x64 | 1.13 M |" in readme.read_text()


RESULTS = "    Results: [{Task: Object Detection, Dataset: COCO, Metrics: {box AP: 50.0}}]\n"
# File, what is replaced in it, by what, and what must be found then.
DIFFERENCES = [
    ("model-index.yml", METAFILE, "", [f"model-index.yml does not import {METAFILE}"]),
    (METAFILE, f"Config: {CLASSIFIER}", "Config: a/b.py", [f"no entry for {CLASSIFIER}", "an entry for a/b.py, which"]),
    (METAFILE, "Name: grootv", "Name: groot", ["groot-pico_demo-cls must have the name of its config"]),
    (METAFILE, "      FLOPs: ", "      Flops: ", ["grootv-pico_demo-cls: lacks FLOPs"]),
    (METAFILE, "FLOPs: 14520000", "FLOPs: 14.52e+6", ["FLOPs must be 14520000, got 14520000.0"]),
    (METAFILE, "64x64", "96x96", ["Input Size must be '64x64', got '96x96'"]),
    (METAFILE, "Batch Size: 32", "Batch Size: 64", ["Batch Size must be 32, got 64"]),
    (METAFILE, "Demo digits", "COCO", ["Training Data must be 'Demo digits', got 'COCO'"]),
    (METAFILE, "    Metadata:\n", f"{RESULTS}    Metadata:\n", [
        "Results Source must be 'paper (arXiv 2406.02395)', got None",
        "Results must be {'Image Classification': {'Top 1 Accuracy'}} for ImageClassifier, got ",
    ]),
    (README, "<!-- models: end -->", "", ["lacks the lines <!-- models: begin --> and"]),
    (README, CLASSIFIER, "configs/no/such.py", ["names configs/no/such.py, which does not"]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "old", "new", "problems"), DIFFERENCES)
def test_finds_what_differs(check_zoo, zoo, path, old, new, problems):
    replace(zoo / path, old, new)
    found = "\n".join(check_zoo.find_problems(zoo))
    assert all(problem in found for problem in problems)


def test_finds_a_folder_without_metafile(check_zoo, zoo):
    (zoo / "configs" / "other").mkdir()
    shutil.copy(ROOT / CLASSIFIER, zoo / "configs" / "other" / "another.py")
    assert "configs/other has no metafile.yml" in check_zoo.find_problems(zoo)


def test_command_lists_the_problems(check_zoo, zoo, monkeypatch):
    monkeypatch.setattr(check_zoo, "find_problems", lambda: ["one", "two"])
    monkeypatch.setattr(sys, "argv", ["check_zoo.py"])
    with pytest.raises(SystemExit, match="one\ntwo"):
        check_zoo.main()


def test_results_are_the_papers():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    models = [model for path in index["Import"] for model in yaml.safe_load((ROOT / path).read_text())["Models"]]
    stated = {
        (model["Name"], result["Dataset"], metric): value
        for model in models
        for result in model.get("Results", [])
        for metric, value in result["Metrics"].items()
    }
    assert stated == PAPER
    assert not any("Weights" in model for model in models)


def test_mim_search_reads_the_index():
    search = pytest.importorskip("mim.commands.search")
    table = search.convert2df(load(str(ROOT / "model-index.yml")))
    assert sorted(table.index) == sorted(path.stem for path in CONFIG_FILES)
    assert set(table["model"]) == {"grootv"}
    assert table.loc["grootv-tiny_8xb128_in1k", "imagenet-1k/top_1_accuracy"] == 83.4
    found = search.filter_by_conditions(table, "parameters>80000000")
    assert {"grootv-base_8xb128_in1k", "grootv-large_64xb64_in21k-384px"} <= set(found.index)
    assert "grootv-small_8xb128_in1k" not in found.index
