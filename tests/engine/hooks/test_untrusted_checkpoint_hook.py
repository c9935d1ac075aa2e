"""What a checkpoint says must not act outside of the run that loads it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import HistoryBuffer

from grootvl_mm.engine.hooks import UntrustedCheckpointHook
from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely
from tests.helpers.small_runs import best, run

RUNNER_TYPES = ("Runner", "FlexibleRunner")


def change(path: Path, **parts: dict) -> Path:
    """Change what a checkpoint says, as a crafted file would."""
    content = load_safely(path)
    for name, changes in parts.items():
        target = content[name] if name == "meta" else content["message_hub"]["runtime_info"]
        target.update(changes)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("runner_type", RUNNER_TYPES)
def test_resuming_executes_nothing_of_the_file(runner_type: str, tmp_path: Path) -> None:
    run(tmp_path / "run", 1, runner_type=runner_type)
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    crafted = change(
        tmp_path / "run" / "iter_1.pth", meta={"config": code, "cfg": code}, info={"cfg": code, "config": code}
    )
    # FlexibleRunner counts one step too many where a best checkpoint was written, so that two are to be done.
    runner = run(tmp_path / "run", 3, crafted, runner_type=runner_type)
    assert runner.iter == 3
    assert not canary.exists()
    # Resumed configs must not get into the run's own checkpoints, where an inferencer would execute them.
    content = load_safely(tmp_path / "run" / "iter_3.pth")
    assert code not in (content["message_hub"]["runtime_info"]["cfg"], content["meta"]["cfg"])
    assert "config" not in content["meta"]
    losses = content["message_hub"]["log_scalars"]["train/loss"]
    assert len(losses.data[0]) == (3 if runner_type == "Runner" else 2)


def test_without_the_hook_the_host_executes_it(tmp_path: Path) -> None:
    """The test above would see it."""
    run(tmp_path / "run", 1)
    canary = tmp_path / "canary"
    change(tmp_path / "run" / "iter_1.pth", meta={"config": f"open({str(canary)!r}, 'w').close()"})
    run(tmp_path / "run", 2, tmp_path / "run" / "iter_1.pth", custom_hooks=[])
    assert canary.exists()


@pytest.mark.parametrize("runner_type", RUNNER_TYPES)
def test_copy_of_a_work_dir_keeps_away_from_its_original(runner_type: str, tmp_path: Path) -> None:
    run(tmp_path / "original", 1, runner_type=runner_type)
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    run(tmp_path / "copy", 3, tmp_path / "copy" / "iter_1.pth", scores=(2.0, 3.0), runner_type=runner_type)
    assert best(tmp_path / "original") == ["best_a_iter_1.pth"]
    assert best(tmp_path / "copy") == ["best_a_iter_3.pth"]


def test_another_work_dir_gets_its_own_best_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "first", 1, scores=(5.0,))
    run(tmp_path / "second", 3, tmp_path / "first" / "iter_1.pth", scores=(3.0, 2.0))
    assert best(tmp_path / "first") == ["best_a_iter_1.pth"]
    assert best(tmp_path / "second") == ["best_a_iter_2.pth"]


def test_resuming_in_place_goes_on_with_the_best_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 1, scores=(5.0,))
    run(tmp_path, 3, tmp_path / "iter_1.pth", scores=(3.0, 6.0))
    assert best(tmp_path) == ["best_a_iter_3.pth"]
    several = tmp_path / "several"
    settings = {"checkpoint": {"save_best": ["a", "b/c"], "rule": ["greater", "less"]}}
    run(several, 1, scores=(5.0,), **settings)
    run(several, 2, several / "iter_1.pth", scores=(6.0,), **settings)
    assert best(several) == ["best_a_iter_2.pth", "best_b_c_iter_1.pth"]


def test_checkpoints_in_a_folder_of_their_own(tmp_path: Path) -> None:
    settings = {"checkpoint": {"out_dir": str(tmp_path / "elsewhere")}}
    run(tmp_path / "run", 1, scores=(1.0,), **settings)
    folder = tmp_path / "elsewhere" / "run"
    run(tmp_path / "run", 2, folder / "iter_1.pth", scores=(2.0,), **settings)
    assert best(folder) == ["best_a_iter_2.pth"]


@pytest.mark.parametrize("several", [False, True], ids=["one score", "several scores"])
@pytest.mark.parametrize(
    "target",
    [
        "{victim}",
        "{folder}",
        "..",
        ".",
        "",
        "../victim.pth",
        "best_victim.pth/../../victim.pth",
        "../best_a.pth",
        7,
        [],
    ],
)
def test_no_file_elsewhere_is_deleted(target: object, several: bool, tmp_path: Path) -> None:
    work_dir = tmp_path / "run"
    settings = {"checkpoint": {"save_best": ["a", "b/c"], "rule": "greater", "max_keep_ckpts": 1}} if several else {}
    run(work_dir, 1, **settings)
    victims = [tmp_path / "victim.pth", tmp_path / "best_a.pth", tmp_path / "victims" / "best_a.pth"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("precious")
    if isinstance(target, str):
        target = target.format(victim=victims[2], folder=victims[2].parent)
    keys = ("best_ckpt", "best_ckpt_a", "best_ckpt_b/c", "last_ckpt")
    ids = [f"/../../{victim.stem}" for victim in victims] + [-1, None, "1"]
    crafted = change(work_dir / "iter_1.pth", info={**dict.fromkeys(keys, target), "keep_ckpt_ids": ids})
    run(work_dir, 3, crafted, **settings)
    assert [victim.read_text() for victim in victims] == 3 * ["precious"]
    assert (work_dir / "iter_3.pth").is_file()


@pytest.mark.parametrize("iteration", [4, 2**62])
def test_checkpoint_from_after_the_end_of_the_run(iteration: int, tmp_path: Path) -> None:
    run(tmp_path, 1)
    later = change(tmp_path / "iter_1.pth", meta={"iter": iteration})
    with pytest.raises(CheckpointError, match=f"from iter {iteration}, but the run ends at iter 3; increase"):
        run(tmp_path, 3, later)


class Resuming:
    """A runner that resumes, without optimizer."""

    _resume, hooks, optim_wrapper, param_schedulers = True, (), None, None
    train_loop = SimpleNamespace(max_epochs=1)

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = str(work_dir)


@pytest.mark.parametrize(
    ("change_it", "message"),
    [
        (lambda content: content.pop("meta"), "not a training checkpoint"),
        (lambda content: content.pop("message_hub"), "not a training checkpoint"),
        (lambda content: content.pop("state_dict"), "not a training checkpoint"),
        (lambda content: content["meta"].pop("iter"), r"meta\['iter'\]"),
        (lambda content: content["meta"].update(iter="9"), r"meta\['iter'\]"),
        (lambda content: content["meta"].update(epoch=-1), r"meta\['epoch'\]"),
        (lambda content: content["meta"].update(epoch=2), "from epoch 2, but the run ends at epoch 1; increase"),
        (lambda content: content["meta"].update(seed={"type": "x"}), r"meta\['seed'\]"),
        (lambda content: content["meta"].update(seed=2**32), r"meta\['seed'\]"),
        (lambda content: content["message_hub"].pop("log_scalars"), "log_scalars"),
        (lambda content: content["message_hub"]["log_scalars"].update(a=1), "log_scalars"),
        (lambda content: content["message_hub"].update(runtime_info=[]), "runtime_info"),
        (lambda content: content["message_hub"]["resumed_keys"].update(a="yes"), "resumed_keys"),
        (lambda content: content.update(optimizer=[1]), "optimizer"),
        (lambda content: content.update(param_schedulers=1), "param_schedulers"),
        (lambda content: content.update(ema_state_dict={"module.b": 1}), "ema_state_dict"),
        (lambda content: content.update(ema_state_dict=[1]), "ema_state_dict"),
        (lambda content: content.update(ema_state_dict=None), "ema_state_dict"),
        (lambda content: content.update(ema_state_dict={"steps": 1, 5: 1}), "ema_state_dict"),
    ],
)
def test_what_cannot_be_resumed_is_told_in_one_line(change_it: object, message: str, tmp_path: Path) -> None:
    content = {
        "meta": {"epoch": 0, "iter": 1, "seed": 3},
        "state_dict": {},
        "message_hub": {
            "log_scalars": {"a": HistoryBuffer()},
            "runtime_info": {"cfg": "a"},
            "resumed_keys": {"a": True},
        },
    }

    UntrustedCheckpointHook().after_load_checkpoint(Resuming(tmp_path), content)
    change_it(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        UntrustedCheckpointHook().after_load_checkpoint(Resuming(tmp_path), content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["best_" + 5000 * "a" + ".pth", "best_\0.pth", b"best_\xff.pth", [1], {}, 5, "best_\n.pth"]
)
def test_best_checkpoints_of_impossible_names_are_forgotten(name: object, tmp_path: Path) -> None:
    content = {
        "meta": {"epoch": 0, "iter": 1},
        "state_dict": {},
        "message_hub": {
            "log_scalars": {"empty": HistoryBuffer(), "train/loss": HistoryBuffer([1.0], [1])},
            "runtime_info": {"best_ckpt": name, "best_score": 1.0},
            "resumed_keys": {},
        },
    }
    UntrustedCheckpointHook().after_load_checkpoint(Resuming(tmp_path), content)
    assert not content["message_hub"]["runtime_info"]
    assert list(content["message_hub"]["log_scalars"]) == ["train/loss"]


@pytest.mark.parametrize("score", ["0.5", None, float("nan"), 10**400, [0.5], {}, torch.ones(2)])
def test_scores_that_are_no_numbers_are_forgotten(score: object, tmp_path: Path) -> None:
    (tmp_path / "best_a_iter_1.pth").touch()
    info = {"best_score": score, "best_ckpt": "best_a_iter_1.pth", "best_score_b": 0.5, "validated_step": score}
    content = {
        "meta": {"epoch": 0, "iter": 1},
        "state_dict": {},
        "message_hub": {"log_scalars": {}, "runtime_info": info, "resumed_keys": {}},
    }
    UntrustedCheckpointHook().after_load_checkpoint(Resuming(tmp_path), content)
    assert info == {"best_score_b": 0.5}
