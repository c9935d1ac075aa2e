"""What the command line tools and demos share, and the configs of this package by name."""

from grootvl_mm.apis.zoo import config_file, model_names, register_in_mmpretrain

__all__ = ["config_file", "model_names", "register_in_mmpretrain"]
