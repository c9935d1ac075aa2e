# Fine-tuning at 384x384, not in the paper. Pass a classifier trained at 224x224:
# `--cfg-options load_from=FILE`.
_base_ = [
    "../_base_/models/grootv_tiny.py",
    "../_base_/datasets/imagenet_grootv_384.py",
    "../_base_/schedules/imagenet_adamw_30e-ft.py",
    "mmpretrain::_base_/default_runtime.py",
]
