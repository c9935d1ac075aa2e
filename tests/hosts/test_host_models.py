"""The hosts' own models with GrootV as their backbone: each trains one step and predicts once.

docs/host_models.md has the table of results. ``GROOTVL_WRITE_TABLES=1`` writes it.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from mmengine.registry import DefaultScope

from tests.helpers.config_cases import ROOT
from tests.helpers.host_models import MODELS_OF, predict, random_batch, swapped_model, train_step

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "host_models.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
CASES = [(host, name) for host, names in MODELS_OF.items() for name in names]


class Result(NamedTuple):
    """What a model did."""

    trained: bool = False
    predicted: bool = False


@pytest.fixture(scope="module")
def results() -> Iterator[dict[tuple[str, str], Result]]:
    """Filled by the tests of the single models."""
    return {}


@pytest.mark.parametrize(("host", "name"), CASES, ids=lambda value: value)
def test_trains_a_step_and_predicts(host: str, name: str, results: dict) -> None:
    pytest.importorskip(host)
    results[host, name] = Result()
    with DefaultScope.overwrite_default_scope(host):
        model = swapped_model(host, name)
        before = {key: value.detach().clone() for key, value in model.backbone.named_parameters()}
        losses = train_step(model, random_batch(host, name, model))
        assert all(torch.as_tensor(value).isfinite().all() for value in losses.values())
        changed = {key for key, value in model.backbone.named_parameters() if not torch.equal(value, before[key])}
        assert changed, "no parameter of the backbone was trained"
        results[host, name] = Result(trained=True)
        predictions = predict(model, random_batch(host, name, model))
        assert len(predictions) > 0
        results[host, name] = Result(trained=True, predicted=True)


def make_table(results: dict[tuple[str, str], Result]) -> str:
    lines = ["| host | model | trained | predicted |", "|---|---|---|---|"]
    for (host, name), result in results.items():
        lines.append(f"| {host} | {name.split('/')[1]} | {' | '.join('yes' if done else 'no' for done in result)} |")
    return "\n".join(lines) + "\n"


def test_the_table_on_the_page(results: dict) -> None:
    if len(results) < len(CASES):
        pytest.skip("not all models were tried")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    page = f"{head}{BEGIN}{make_table(results)}{END}{tail}"
    if os.environ.get("GROOTVL_WRITE_TABLES"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page
