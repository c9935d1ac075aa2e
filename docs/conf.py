"""Sphinx configuration of the documentation site: ``make docs``.

The source folder is the root of the repository, so that links between README, guides and the pages of the configs hold
on the site as they do in a checkout.
"""

from pathlib import Path

from sphinx.application import Sphinx

from grootvl_mm.version import __version__

project = "grootvl_mm"
author = "the grootvl_mm contributors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "configs/*/README.md"]
exclude_patterns = ["docs/_build"]
ROOT = Path(__file__).resolve().parents[1]
TASKS = ["docs/detection", "docs/segmentation", "docs/classification"]
NAVIGATION = {
    "Tasks": TASKS,
    "Guides": sorted({f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} - set(TASKS)),
    "Notes": ["docs/notes/*"],
    "Model zoo": ["configs/*/README"],
    "API reference": ["docs/api/*"],
    "Project": sorted({path.stem for path in ROOT.glob("*.md")} - {root_doc}),
}

myst_heading_anchors = 3
napoleon_use_ivar = True
# make docs needs none of the packages that the language models need.
autodoc_mock_imports = ["huggingface_hub", "peft", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_title = f"grootvl_mm {version}"
html_extra_path = ["_static/index.html"]
html_show_sphinx = False


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """Append the table of contents to the README, where GitHub would show it as code."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            entries = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:glob:\n\n{entries}\n```\n"


def skip_field_aliases(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: dict) -> bool | None:
    """Leave out the fields of a NamedTuple, which the docstring of its class describes."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Register the handlers of this file."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", skip_field_aliases)
