"""This package's configs by name, for the inferencers and other APIs of mmdet, mmseg and mmpretrain.

mmdet and mmseg look up model names in their own zoo only, so pass the path::

    DetInferencer(config_file("mask-rcnn_grootv-tiny_fpn_1x_coco"), weights=FILE)

mmpretrain accepts other zoos once they are registered::

    register_in_mmpretrain()
    get_model("grootv-tiny_8xb128_in1k", pretrained=FILE)
"""

import difflib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def model_names() -> list[str]:
    """The names of all models, sorted; a model is named after its config file."""
    return sorted(_configs())


def config_file(name: str) -> str:
    """Return the path of a model's config file.

    Args:
        name: One of :func:`model_names`, for example ``grootv-tiny_8xb128_in1k``.

    Raises:
        ValueError: There is no such model.
        FileNotFoundError: This installation has no configs.
    """
    configs = _configs()
    if name not in configs:
        near = difflib.get_close_matches(name, configs)
        raise ValueError(
            f"grootvl_mm has no model {name!r}; "
            + (f"similar names: {', '.join(near)}" if near else "grootvl_mm.apis.zoo.model_names() lists all")
        )
    return str(configs[name])


def register_in_mmpretrain() -> None:
    """Add our models to the zoo of mmpretrain: ``get_model``, ``list_models`` and the inferencers.

    Importing mmpretrain takes seconds, so this is not done on ``import grootvl_mm``. Repeated calls are harmless.
    """
    from mmpretrain.apis import ModelHub

    if not all(map(ModelHub.has, _configs())):
        folder = _folder()
        ModelHub.register_model_index(folder / "model-index.yml", config_prefix=folder)


@cache
def _configs() -> dict[str, Path]:
    # The language configs are recipes for tools/language, not for a Runner.
    paths = (_folder() / "configs").glob("[!_]*/*.py")
    return {path.stem: path for path in paths if path.parent.name != "language"}


def _folder() -> Path:
    """The folder of ``configs`` and ``model-index.yml``: in the installed package, or beside it in a checkout."""
    for folder in (PACKAGE / ".mim", PACKAGE.parent):
        if (folder / "model-index.yml").is_file():
            return folder
    raise FileNotFoundError(f"no configs in {PACKAGE / '.mim'}; reinstall grootvl_mm (pip install .)")
