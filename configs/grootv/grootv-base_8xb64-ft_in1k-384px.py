# Fine-tuning at 384x384, not of the paper. It starts from a classifier trained at 224x224, which must be
# given: `--cfg-options load_from=FILE`. Drop path stays as it was, as in Swin's.
_base_ = [
    "../_base_/models/grootv_base.py",
    "../_base_/datasets/imagenet_grootv_384.py",
    "../_base_/schedules/imagenet_adamw_30e-ft.py",
    "mmpretrain::_base_/default_runtime.py",
]
