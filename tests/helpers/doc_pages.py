"""Reads the pages of the documentation, and parses their commands without running them."""

import ast
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import is_installed
from packaging.requirements import Requirement

from grootvl_mm.apis.zoo import config_file
from tests.helpers.config_cases import load_config
from tests.helpers.tool_runs import ROOT, load_script

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        # tests/tools/test_export_model.py runs all that docs/deployment.md says, also what is not of this project.
        *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "deployment.md"),
        *sorted((ROOT / "configs").glob("*/README.md")),
    )
}

LANGUAGE = "docs/language.md"  # needs an environment of its own
WRONG = (AssertionError, OSError, SystemExit, ValueError, click.UsageError)


def blocks(page: str, language: str) -> list[str]:
    """The code in a page."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(code) for _, code in found]


def commands(page: str) -> list[str]:
    """The commands in a page, each in one line, without comments and with the values of its variables."""
    found, variables = [], {}
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            command = re.sub(r"\$(\w+)", lambda match: variables[match[1]], command)
            if assigned := re.fullmatch(r"(\w+)=(\S+)", command):
                variables[assigned[1]] = assigned[2]
            elif command:
                found.append(command)
    return found


def all_commands() -> list[str]:
    """The commands of all pages, each once."""
    return list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def python_blocks(kind: str, *without: str) -> list:
    """Parameters for the Python of all pages but ``without``, of a kind: ``own data``, ``config`` or ``code``."""
    found = []
    for page in PAGES.keys() - set(without):
        for code in blocks(page, "python"):
            is_config = not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body)
            if kind == ("own data" if code.startswith("# my_") else "config" if is_config else "code"):
                found.append(pytest.param(code, id=f"{page}: {code.splitlines()[0]}"))
    return sorted(found, key=lambda block: block.id)


def with_bases_found(code: str) -> str:
    """A config with paths in place of ``mmseg::``, by which onedl-mmengine 0.10.12 does not find the bases of mmseg."""
    if is_installed(MODULE2PACKAGE["mmseg"]):
        return code
    return code.replace("mmseg::", f"{Path(importlib.util.find_spec('mmseg').origin).parent}/.mim/configs/")


def check_command(command: str, stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a command exists and takes its arguments, and that its config loads, without running it.

    Args:
        command: as in a page.
        stubs: folder where launchers are put that write their arguments and do nothing else.
        monkeypatch: sets the arguments.

    Raises:
        One of ``WRONG``: Something is wrong with the command, or there is no check for its program.
    """
    words = shlex.split(command)
    environment = {}
    while re.match(r"\w+=", words[0]):
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    program = Path(words[0]).name
    if program == "bash" or program.startswith("python"):
        words.pop(0)
    if program == "make":
        _check_make(words[1:])
    elif program == "pip":
        _check_pip(words[1:])
    elif words[:2] == ["-m", "pytest"]:
        assert all(Path(word).exists() for word in words[2:] if "/" in word)
    elif words[0].startswith(".dev_scripts/") and words[0].endswith(".sh"):
        script = Path(words[0]).read_text()
        assert all(word in script for word in words[1:] if word.startswith("-"))
    else:
        if words[0] == "-m":
            words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
        elif Path(words[0], "__main__.py").is_file():
            words[0] += "/__main__.py"
        if program == "mim":
            words = _of_mim(words[1:])
        elif words[0].endswith(".sh"):
            words = _of_launcher(words, environment, stubs)
        if words and not words[0].endswith(".py"):
            raise ValueError(f"no check for {words[0]!r}")
        _check_script(words, monkeypatch)


def _check_make(words: list[str]) -> None:
    makefile = Path("Makefile").read_text()
    for word in words:
        pattern = rf"^{word.split('=')[0]} \?=" if "=" in word else rf"^{word}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word!r}"


def _check_pip(words: list[str]) -> None:
    subcommand, *arguments = words
    options = subprocess.check_output([sys.executable, "-m", "pip", subcommand, "--help"], text=True)
    for word in arguments:
        if word.startswith("-"):
            assert re.search(rf"(^| ){word}\b", options, re.MULTILINE), f"pip {subcommand} has no option {word}"
        elif Path(word.split("[")[0]).exists():
            extras = set(re.findall(r"[\w-]+", word.partition("[")[2]))
            assert extras <= set(re.findall(r"^([\w-]+) = \{ file", Path("pyproject.toml").read_text(), re.MULTILINE))
        else:
            Requirement(word)


def _of_mim(words: list[str]) -> list[str]:
    """The call of our script that mim makes of its own command, if there is one."""
    module = pytest.importorskip(f"mim.commands.{words[0]}")
    given = module.cli.make_context(words[0], words[1:]).params
    if words[0] == "search":
        return []
    if words[0] == "run":
        found = importlib.util.find_spec(given["package"])
        folder = ROOT if given["package"] == "grootvl_mm" else Path(found.origin).with_name(".mim")
        (script,) = (folder / "tools").rglob(f"{given['command']}.py")
        return [str(script), *given["other_args"]] if folder == ROOT else []
    config = given["config"]
    if given["package"] == "grootvl_mm":
        (config,) = (str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob(config))
    checkpoint = [given["checkpoint"]] if words[0] == "test" else []
    return [f"tools/{words[0]}.py", config, *checkpoint, *given["other_args"]]


def _of_launcher(words: list[str], environment: dict[str, str], stubs: Path) -> list[str]:
    """The call of the Python script that a shell script makes."""
    for name in ("python", "srun"):
        stub = stubs / name
        stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
        stub.chmod(0o755)
    environment = os.environ | environment | {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHON": str(stubs / "python")}
    output = subprocess.check_output(["bash", *words], cwd=ROOT, env=environment, text=True, stderr=subprocess.DEVNULL)
    called = output.splitlines()
    return called[next(i for i, word in enumerate(called) if word.endswith(".py")) :]


def _check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not words:
        return
    if "language" in words[0]:
        pytest.importorskip("transformers")
    module = load_script(words[0])
    monkeypatch.setattr(sys, "argv", words)
    arguments = module.parse_args()
    assert not getattr(arguments, "pytest", []), f"{words[0]} does not know {arguments.pytest}"
    config = getattr(arguments, "config", None)
    if config and not any(f"# {config}\n" in text for text in PAGES.values()):  # else a page says what to write there
        cfg = Config(_load_config(config))
        cfg.merge_from_dict(getattr(arguments, "cfg_options", None) or {})


@functools.cache
def _load_config(path_or_name: str) -> dict:
    path = ROOT / path_or_name
    return load_config(path if path.is_file() else Path(config_file(path_or_name))).to_dict()


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def links(markdown: str) -> list[tuple[str, str]]:
    """Paths and anchors of the links into the repository."""
    found = re.findall(r"\]\(([^)#\s]*)#?([\w-]*)\)", without_code(markdown))
    return [(path, anchor) for path, anchor in found if "://" not in path]


def without_code(markdown: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", markdown, flags=re.MULTILINE | re.DOTALL)
