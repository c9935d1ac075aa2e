# Fine-tuning on ImageNet-1K of the model that grootv-large_64xb64_in21k-384px.py trains, which must be
# given: `--cfg-options load_from=FILE`. Its head has other classes and starts anew. Not of the paper.
_base_ = [
    "../_base_/models/grootv_large.py",
    "../_base_/datasets/imagenet_grootv_384.py",
    "../_base_/schedules/imagenet_adamw_30e-ft.py",
    "mmpretrain::_base_/default_runtime.py",
]
