"""docs/api.md is what .dev_scripts/make_api_docs.py makes of the docstrings."""

import pkgutil
import re
import sys

import pytest
import torch

import grootvl_mm
from tests.helpers.tool_runs import ROOT, load_script


@pytest.fixture(scope="module")
def make_api_docs():
    return load_script(".dev_scripts/make_api_docs.py")


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make_api_docs.py", *arguments])
    module.main()


def test_page_is_up_to_date(make_api_docs, monkeypatch):
    run(make_api_docs, monkeypatch, "--check")


def test_check_finds_a_change_and_writing_repairs_it(make_api_docs, monkeypatch, tmp_path):
    page = tmp_path / "api.md"
    page.write_text(make_api_docs.PAGE.read_text().replace("tree_scan(x: Tensor", "tree_scan(y: Tensor"))
    monkeypatch.setattr(make_api_docs, "PAGE", page)
    with pytest.raises(SystemExit, match=r"differs from the docstrings; run \.dev_scripts/make_api_docs\.py"):
        run(make_api_docs, monkeypatch, "--check")
    run(make_api_docs, monkeypatch)
    run(make_api_docs, monkeypatch, "--check")


def test_every_public_part_of_the_package_is_shown(make_api_docs):
    shown = {name for section in make_api_docs.SECTIONS for name in section.modules}
    parts = {f"grootvl_mm.{part.name}" for part in pkgutil.iter_modules(grootvl_mm.__path__)}
    # The library, the registries that a config reaches by scope, and what needs no reference.
    assert parts - shown <= {f"grootvl_mm.{name}" for name in ("_C", "registry", "torch_versions", "version")}


def test_all_that_configs_can_name_is_shown(make_api_docs):
    headings = set(re.findall(r"^### `(\w+)`$", make_api_docs.PAGE.read_text(), re.MULTILINE))
    pattern = re.compile(r"^@\w+\.register_module\(\)\nclass (\w+)", re.MULTILINE)
    files = (ROOT / "grootvl_mm").rglob("*.py")
    named = {name for path in files for name in pattern.findall(path.read_text())}
    assert {"GrootV", "CPUAmpOptimWrapper"} <= named <= headings


DOCSTRING = """\
First line with ``code`` and 2**i.

A list:
- one
  goes on
- two, see :func:`package.module.scan`

Example::

    scan(
        x
    )

Args:
    x: (B, L) tensor, for example
        with nested: colons.
    a, b: two at once.

Returns:
    The sum of ``x``.

Raises:
    ValueError, TypeError: bad input.
"""
MARKDOWN = """\
First line with `code` and 2\\*\\*i.

A list:
- one goes on
- two, see [`scan`](#scan)

Example:

```python
scan(
    x
)
```

**Arguments**

- `x`: (B, L) tensor, for example with nested: colons.
- `a`, `b`: two at once.

**Returns**

The sum of `x`.

**Raises**

- `ValueError`, `TypeError`: bad input.
"""


def test_docstring_to_markdown(make_api_docs):
    assert make_api_docs.to_markdown(DOCSTRING, {"scan"}) == MARKDOWN


def test_signatures(make_api_docs):
    def short(x: torch.Tensor, *, scale: float = 1.0, mode: str = "a") -> None: ...

    class Inherited(Exception):
        __module__ = "grootvl_mm.somewhere"

    assert make_api_docs.signature("short", short) == 'short(x: Tensor, *, scale: float = 1.0, mode: str = "a")'
    assert make_api_docs.signature("Inherited", Inherited) == "class Inherited(Exception)"
