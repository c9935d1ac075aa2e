"""Lets ``torch.load`` read mmengine's checkpoints while safe loading stays on.

From torch 2.6 on, ``torch.load`` refuses everything but tensors and plain containers
(``weights_only=True``). The checkpoints of mmengine's Runner also hold their message hub:
:class:`~mmengine.logging.HistoryBuffer` objects, NumPy arrays and NumPy scalars, which are
therefore refused on ``--resume`` and ``test``. Exactly these are allowed here, and one more: the
config that the published training code puts into its checkpoints, which is read as a dictionary.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# The statistics that every HistoryBuffer knows, and which it writes into its pickle as bound names.
_STATISTICS = ("mean", "min", "max", "current")

# Type codes of booleans, integers, and 16, 32 and 64 bit floats.
_DTYPES = "?" + np.typecodes["AllInteger"] + "efd"


def _history_buffer_statistic(owner: Any, name: str) -> Callable:
    """Stand in for ``getattr`` while a checkpoint is read: HistoryBuffer's statistics only.

    The real ``getattr`` would give a crafted file a way to any attribute of any allowed object.
    """
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise pickle.UnpicklingError(
            f"the checkpoint asks for attribute {name!r} of {owner!r}; "
            f"only {', '.join(_STATISTICS)} of mmengine's HistoryBuffer are allowed"
        )
    return getattr(owner, name)


class _ConfigNode:
    """Stands in for yacs' config class while a file is read, and makes a plain dictionary of it."""

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def allow_mmengine_checkpoints() -> None:
    """Put the types that mmengine's (and the published) checkpoints hold on torch's list of safe globals.

    ``weights_only`` is never turned off: a checkpoint with any other type is still refused.
    Before torch 2.6, where safe loading is not the default, nothing is done. Calling it twice
    does no harm.
    """
    if torch.__version__ < "2.6":
        return
    # The two functions are private to NumPy and moved in version 2; files name them by either path.
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    moved = [
        (function, f"{module}.multiarray.{function.__name__}")
        for function in (reconstruct, scalar)
        for module in ("numpy.core", "numpy._core")
    ]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_buffer_statistic, "builtins.getattr"),
            (_ConfigNode, "yacs.config.CfgNode"),
            np.ndarray,
            np.dtype,
            *moved,
            *(type(np.dtype(code)) for code in _DTYPES),
        ]
    )


def load_safely(path: str | Path, **options: Any) -> Any:
    """Read a file of ``torch.save`` onto the CPU, with what mmengine's checkpoints hold and nothing else.

    Args:
        path: the file.
        options: of ``torch.load``.

    Raises:
        pickle.UnpicklingError: the file holds objects of other types.
    """
    # Again: onedl-mmengine forgets types after it has read a file.
    allow_mmengine_checkpoints()
    return torch.load(str(path), map_location="cpu", weights_only=True, **options)
