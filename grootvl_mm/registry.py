"""Registries of grootvl_mm: children of mmengine's, in the scope ``grootvl_mm``.

``type='grootvl_mm.NAME'`` works from any other scope without ``custom_imports``: mmengine imports ``<scope>.registry``
and then the ``locations`` given here.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import STRATEGIES as MMENGINE_STRATEGIES
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="grootvl_mm", locations=["grootvl_mm.models"])
# Not under bare names: registering them would import OpenCV, which the models do not need.
HOOKS = Registry(
    "hook",
    parent=MMENGINE_HOOKS,
    scope="grootvl_mm",
    locations=["grootvl_mm.engine.hooks"],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="grootvl_mm",
    locations=["grootvl_mm.engine.optimizers"],
)
OPTIM_WRAPPERS = Registry(
    "optimizer wrapper",
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope="grootvl_mm",
    locations=["grootvl_mm.engine.optimizers"],
)
STRATEGIES = Registry(
    "strategy", parent=MMENGINE_STRATEGIES, scope="grootvl_mm", locations=["grootvl_mm.engine.strategies"]
)
TRANSFORMS = Registry("transform", parent=MMENGINE_TRANSFORMS, scope="grootvl_mm", locations=["grootvl_mm.datasets"])


def expose_bare_names() -> None:
    """Make this package's models and constructors buildable by bare names in the scopes of mmdet, mmseg and mmpretrain.

    These scopes look up unknown names in mmengine's root registries, so the modules are registered there too.
    """
    for registry in (MODELS, OPTIM_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS):
        for name, module in registry.module_dict.items():
            if name not in registry.parent.module_dict:
                registry.parent.register_module(name=name, module=module)
