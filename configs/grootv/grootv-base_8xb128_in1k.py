_base_ = [
    "../_base_/models/grootv_base.py",
    "../_base_/datasets/imagenet_grootv_224.py",
    "../_base_/schedules/imagenet_adamw_300e.py",
    "mmpretrain::_base_/default_runtime.py",
]
