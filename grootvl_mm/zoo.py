"""Old import path of :mod:`grootvl_mm.apis.zoo`."""

from grootvl_mm.apis.zoo import config_file, model_names, register_in_mmpretrain

__all__ = ["config_file", "model_names", "register_in_mmpretrain"]
