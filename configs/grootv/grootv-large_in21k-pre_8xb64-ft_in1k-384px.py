# Fine-tuning on ImageNet-1K, not in the paper. Pass the model that grootv-large_64xb64_in21k-384px.py trains:
# `--cfg-options load_from=FILE`. The head has other classes and is reinitialized.
_base_ = [
    "../_base_/models/grootv_large.py",
    "../_base_/datasets/imagenet_grootv_384.py",
    "../_base_/schedules/imagenet_adamw_30e-ft.py",
    "mmpretrain::_base_/default_runtime.py",
]
