# The authors' table of models announces GrootV-L as "ImageNet-22K, 384x384" but states neither its size nor
# its recipe. Both are ours (see the base files).
_base_ = [
    "../_base_/models/grootv_large.py",
    "../_base_/datasets/imagenet21k_grootv_384.py",
    "../_base_/schedules/imagenet21k_adamw_90e.py",
    "mmpretrain::_base_/default_runtime.py",
]

model = dict(head=dict(num_classes=21841))
