"""Another name of :mod:`grootvl_mm.apis.zoo`, which code written for version 0.1 imports."""

from grootvl_mm.apis.zoo import config_file, model_names, register_in_mmpretrain

__all__ = ["config_file", "model_names", "register_in_mmpretrain"]
