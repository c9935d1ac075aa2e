"""demo/language_study.py: its tasks, its tables, and a complete run on tiny data."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.helpers.tool_runs import ROOT, load_script

SIZES = {
    **{"hidden": 16, "layers": 1, "state": 4, "vocabulary": 400, "length": 16, "batch-size": 4},
    **{"pretraining-steps": 10, "steps": 2, "pairs": 4, "words": 6, "sentences": 16, "evaluated": 8},
}
PAGE = "# Page\n\n<!-- study -->\nold\n<!-- end of study -->\n\nRest.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    letters = "abcdefghij"
    words = ["".join(generator.choices(letters, k=3)) for _ in range(40)]
    sentences = [" ".join(generator.choices(words, k=8)).capitalize() + "." for _ in range(300)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(" ".join(sentences[start : start + 5]) for start in range(0, 300, 5)))
    return path


@pytest.fixture
def study(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the study in this process and return its tables."""
    module = load_script("demo/language_study.py")
    monkeypatch.setattr(module, "ROUNDS", 1)

    def run(*arguments: object, **sizes: int) -> str:
        options = [word for name, size in {**SIZES, **sizes}.items() for word in (f"--{name}", str(size))]
        command = ["study", "--preset", "quick", "--text", text, "--work-dir", tmp_path / "study", *options, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        module.main()
        return (tmp_path / "study" / "README.md").read_text()

    return run


def test_study_runs_and_does_not_repeat_itself(
    study: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first = study("--arms", "plain", "causal", "--modes", "lora", "--page", page)
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(results["runs"]) == {"plain/lora/0", "causal/lora/0"}
    assert page.read_text() == PAGE.replace("\nold\n", f"\n\n{first}\n")
    module = load_script("demo/language_study.py")
    done = []
    finetune = module.finetune
    monkeypatch.setattr(module, "finetune", lambda *args: done.append(args[2:5]) or finetune(*args))
    monkeypatch.setattr(module, "pretrain", None)  # done
    whole = study("--seeds", "0", "1", "--arms", "plain", "chain", "tree", "causal")
    assert len(done) == 4 * 2 * 2 - 2
    assert ("plain", "lora", 0) not in done
    lines = whole.splitlines()
    assert [line for line in lines if "±" in line] == lines[3:11]
    assert lines[4].startswith("| chain, 1.3 times (control) | LoRA | 2 | ")
    assert "gzip" in whole
    assert len([line for line in lines if line.startswith("| GrootL ")]) == 3  # twice trained, once timed
    with pytest.raises(SystemExit, match="holds results of other settings"):
        study(steps=3)
    assert {path.name for path in (tmp_path / "study" / "data").iterdir()} == {"train.json", "val.json"}


def test_recall_asks_for_what_the_prompt_says() -> None:
    data = load_script("demo/language_data.py")
    words, separator = list(range(100, 112)), 5
    samples = data.RecallData(words, 50, (2, 6), separator, seed=1)
    assert list(samples) == list(data.RecallData(words, 50, (2, 6), separator, seed=1))
    for sample, distance in zip(samples, samples.distances, strict=True):
        length = sample["prompt_length"]
        prompt, answer = sample["input_ids"][:length], sample["input_ids"][length:]
        listed, (mark, asked) = prompt[:-2], prompt[-2:]
        pairs = dict(zip(listed[::2], listed[1::2], strict=True))
        assert mark == separator
        assert pairs[asked] == answer[0]
        assert listed[-2 * distance] == asked
        assert dict(zip([asked, *answer[1::2]], answer[::2], strict=True)) == pairs
        assert [label for label in sample["labels"] if label != -100] == answer[::2]
        assert set(pairs) <= set(words[:6])
        assert set(pairs.values()) <= set(words[6:])


def test_text_is_read_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_script("demo/language_data.py")
    package = tmp_path / data.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / data.MODULE).write_text('import nothing\nbible = f("title", """\nIn [the] beginning.\n""", {1: "a"})\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, data.PACKAGE, raising=False)
    assert data.read_text(None) == "In the beginning."


def test_sentences_are_split() -> None:
    data = load_script("demo/language_data.py")
    assert data.split_sentences("In: the\nbeginning. Who?  I!\nEnd") == ["In: the beginning.", "Who?", "I!", "End"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "9", "--words", "8"], "--pairs must be at most --words (8), got 9"),
        (["--page", "README.md"], "lacks the lines"),
    ],
)
def test_wrong_arguments(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["study", *options])
    with pytest.raises(SystemExit):
        load_script("demo/language_study.py").parse_args()
    assert message in capsys.readouterr().err
