"""Sphinx configuration of the documentation site: ``make docs``.

The source folder is the root of the repository, so that links between README, guides and the pages of the configs work
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
ZOO = ("grootv", "mask_rcnn", "cascade_mask_rcnn", "retinanet", "upernet", "language", "ablations", "demo")
API = ("models", "ops", "engine", "apis", "datasets", "visualization", "explorer", "language")
# In the order of the README. Sphinx warns about pages that are missing here, and make docs treats warnings as errors.
NAVIGATION = {
    "Tasks": ["docs/detection", "docs/segmentation", "docs/classification"],
    "Guides": ["docs/training", "docs/inference", "docs/deployment", "docs/tools", "docs/host_models"],
    "Trees": ["docs/visualization", "docs/explorer", "docs/study", "docs/graphs"],
    "Language": ["docs/language"],
    "Engineering": ["docs/performance", "docs/notes/performance", "docs/cuda", "docs/reliability"],
    "Model zoo": [f"configs/{name}/README" for name in ZOO],
    "API reference": [f"docs/api/{name}" for name in API],
    "Project": ["CONTRIBUTING", "SECURITY", "CHANGELOG"],
}

myst_heading_anchors = 3
napoleon_use_ivar = True
# make docs works without the packages that the language models need.
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
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def skip_field_aliases(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: dict) -> bool | None:
    """Omit the fields of a NamedTuple, which the docstring of its class describes."""
    return True if str(obj.__doc__).startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Register the handlers of this file."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", skip_field_aliases)
