"""GrootV (GrootVL / MambaTree) for OpenMMLab: a state space model that scans images along a spanning tree.

Importing the package registers its modules, also under their bare names (``type='GrootV'``), and lets ``torch.load``
read mmengine's checkpoints with ``weights_only=True``. The compiled operators are optional (see :mod:`grootvl_mm.ops`).
"""

from grootvl_mm import engine, models, ops
from grootvl_mm.registry import expose_bare_names
from grootvl_mm.utils.safe_checkpoints import allow_mmengine_checkpoints
from grootvl_mm.version import __version__

allow_mmengine_checkpoints()
expose_bare_names()

__all__ = ["__version__", "engine", "models", "ops"]
