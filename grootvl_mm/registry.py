"""Registries of grootvl_mm: children of mmengine's, in the scope ``grootvl_mm``.

``type='grootvl_mm.NAME'`` finds the parts below from any other scope without ``custom_imports``, because mmengine
imports ``<scope>.registry`` by itself and then the ``locations`` named here.
"""

from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="grootvl_mm", locations=["grootvl_mm.models"])


def expose_bare_names() -> None:
    """Make every module of this package buildable by its bare name in the scopes of mmdet, mmseg and mmpretrain.

    Those scopes look an unknown name up in mmengine's root registries, so the modules are registered there too.
    """
    for name, module in MODELS.module_dict.items():
        if name not in MMENGINE_MODELS.module_dict:
            MMENGINE_MODELS.register_module(name=name, module=module)
