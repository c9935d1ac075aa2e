# Fine-tuning at 384x384, not in the paper. Pass a classifier trained at 224x224:
# `--cfg-options load_from=FILE`. Drop path is unchanged, as in Swin's fine-tuning.
_base_ = [
    "../_base_/models/grootv_base.py",
    "../_base_/datasets/imagenet_grootv_384.py",
    "../_base_/schedules/imagenet_adamw_30e-ft.py",
    "mmpretrain::_base_/default_runtime.py",
]
