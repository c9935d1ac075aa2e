"""``--cfg-options``: values as they were given, and otherwise what mmengine reads."""

import argparse
from typing import Any

import pytest
from mmengine.config import DictAction

from grootvl_mm.apis.cfg_options import CfgOptions
from tests.helpers.tool_runs import ROOT


def read(*options: str, action: type[argparse.Action] = CfgOptions) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=action)
    return parser.parse_args(["--cfg-options", *options]).cfg_options


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("my work/a.pth", "my work/a.pth"),
        ("'my work/a.pth'", "my work/a.pth"),
        ('"my work/a.pth"', "my work/a.pth"),
        ("two  spaces and\ta tab", "two  spaces and\ta tab"),
        (" around ", " around "),
        ("runs (old) 2/a.pth", "runs (old) 2/a.pth"),
        ("(old) runs (new)", "(old) runs (new)"),
        ("a [1.pth", "a [1.pth"),
        ("f(a, b)", "f(a, b)"),
        ("a=b c", "a=b c"),
        ("my data/, your data/", ["my data/", "your data/"]),
        ("[my data/,your data/ ]", ["my data/", "your data/"]),
        ("['the cat', \"the dog\"]", ["the cat", "the dog"]),
        ("('the cat',)", ("the cat",)),
        ("[(a b, 1), [2, c d], 3.5, None, true]", [("a b", 1), [2, "c d"], 3.5, None, True]),
        ("(1, 2), (3, 4)", [(1, 2), (3, 4)]),
        (" 5 ", 5),
        (" True", True),
        (" None ", None),
        ("", ""),
    ],
)
def test_spaces(text: str, value: object) -> None:
    assert read(f"key={text}") == {"key": value}


@pytest.mark.parametrize(
    "text",
    [
        *("1", "1.5", "1e-3", "-2", "TRUE", "None", "inf", "a", "x=y", "http://x/y?z=1", "'a'", "'1'"),
        *("a,b", "1,2,", "a,,b", "[1,2]", "[]", "()", "(1,2)", "[(1,2),[a,b],c]", "[[1],[2,3]]", '"[a,b]"', "'(1,2)'"),
    ],
)
def test_without_spaces_as_mmengine(text: str) -> None:
    expected = read(f"a.b={text}", action=DictAction)
    actual = read(f"a.b={text}")
    assert actual == expected
    assert type(actual["a.b"]) is type(expected["a.b"])


def test_options_add_up() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=CfgOptions)
    args = parser.parse_args(["--cfg-options", "a=1", "b=2", "--cfg-options", "b=3"])
    assert args.cfg_options == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("load_from", "argument --cfg-options: expected KEY=VALUE, got 'load_from'"),
        ("=a", "expected KEY=VALUE, got '=a'"),
        ("a=[1,2", "the brackets of '[1,2' do not match"),
        ("a=[1,(2]", "do not match"),
        ("a=1,2)", "do not match"),
    ],
)
def test_errors(text: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(text)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_tool_reads_them_here() -> None:
    """No tool or demo brings mmengine's action back."""
    for folder in ("tools", "demo", "grootvl_mm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "cfg_options.py":
                assert "DictAction" not in path.read_text(), path
