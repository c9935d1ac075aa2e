"""Versions stated in two places agree."""

import re

import yaml

from tests.helpers.tool_runs import ROOT


def pins(path: str) -> set[str]:
    """The requirements ``name==version`` of a file, without markers."""
    return set(re.findall(r"^[\w-]+==[^;\s]+", (ROOT / path).read_text(), re.MULTILINE))


def test_pre_commit_has_the_tested_tools() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    used = {pin for hook in repository["hooks"] for pin in hook["additional_dependencies"]}
    assert used <= pins("requirements/constraints.txt")


def test_readme_names_the_tested_versions() -> None:
    readme = (ROOT / "README.md").read_text()
    for stack in ("openmmlab", "onedl"):
        for pin in pins(f"requirements/stacks/{stack}.txt"):
            name, version = pin.split("==")
            if name not in ("pandas", "opencv-python-headless", "tqdm"):
                assert re.search(rf"{name}\D* {re.escape(version)} ", readme), pin
    (torch,) = (pin for pin in pins("requirements/torch.txt") if pin.startswith("torch=="))
    assert f"PyTorch {torch.removeprefix('torch==')} " in readme
