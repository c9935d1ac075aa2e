"""Sphinx configuration of the documentation site: ``make docs``.

The source folder is the root of the repository, so that links between README, guides and the pages of the configs hold
on the site as they do in a checkout.
"""

from sphinx.application import Sphinx

from grootvl_mm.version import __version__

project = "grootvl_mm"
author = "the grootvl_mm contributors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "configs/*/README.md"]
exclude_patterns = ["docs/_build"]
NAVIGATION = {
    "Tasks": ["docs/detection", "docs/segmentation", "docs/classification"],
    "Guides": ["docs/training", "docs/inference", "docs/deployment", "docs/cuda", "docs/performance"],
    "Model zoo": ["configs/*/README"],
    "API reference": ["docs/api/*"],
    "Project": ["CONTRIBUTING", "CHANGELOG"],
}

myst_heading_anchors = 3
napoleon_use_ivar = True
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


def setup(app: Sphinx) -> None:
    """Register the handlers of this file."""
    app.connect("source-read", add_navigation)
