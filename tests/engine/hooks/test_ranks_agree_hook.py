"""Processes whose settings differ raise an error before training."""

from pathlib import Path

import pytest

from grootvl_mm.engine.hooks import RanksAgreeHook, RanksDifferError, ranks_agree_hook
from tests.helpers.small_runs import run


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (None, None),
        ("seed", 4),
        ("optimizer options (digest)", "0123abcd"),
        ("model parameters (digest)", "0123abcd"),
        ("dataset size", 5),
        ("start (epoch, iteration)", (0, 2)),
    ],
)
def test_what_differs_is_named(
    part: str | None, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = run(tmp_path, 1, randomness={"seed": 3})
    monkeypatch.setattr(ranks_agree_hook, "is_distributed", lambda: True)
    monkeypatch.setattr(ranks_agree_hook, "get_world_size", lambda: 2)
    # Rank 1 has the same but for one thing.
    monkeypatch.setattr(
        ranks_agree_hook, "all_gather_object", lambda own: [own, own if part is None else {**own, part: value}]
    )
    if part is None:
        RanksAgreeHook().before_train(runner)
        return
    with pytest.raises(RanksDifferError, match=r"ranks differ in: ") as raised:
        RanksAgreeHook().before_train(runner)
    assert f"{part}: " in str(raised.value)
    assert f"{value} on rank 1" in str(raised.value)
    assert str(raised.value).count(" on rank ") == 2


def test_digests_tell_rates_and_models_apart(tmp_path: Path) -> None:
    first = ranks_agree_hook.describe(run(tmp_path, 1))
    second = ranks_agree_hook.describe(run(tmp_path, 1, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.2}}))
    different = {name for name in first if first[name] != second[name]} - {"seed"}
    assert different == {"optimizer options (digest)", "first learning rate"}


def test_one_process_has_nothing_to_compare(tmp_path: Path) -> None:
    run(tmp_path, 1, custom_hooks=[{"type": "grootvl_mm.RanksAgreeHook"}])
