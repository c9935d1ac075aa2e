"""Shared code of the command line tools and demos, and lookup of this package's configs by name."""

from grootvl_mm.apis.zoo import config_file, model_names, register_in_mmpretrain

__all__ = ["config_file", "model_names", "register_in_mmpretrain"]
