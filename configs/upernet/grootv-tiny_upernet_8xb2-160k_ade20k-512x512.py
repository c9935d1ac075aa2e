# In the paper, the backbone starts from ImageNet-1K weights, without which this recipe does not reach the
# published results (prefix: only for a classifier checkpoint written by mmpretrain):
#   --cfg-options model.backbone.init_cfg.type=Pretrained \
#                 model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.prefix=backbone.
# Not stated in the paper, taken from Swin: drop path (0.2), channels of the heads, SyncBN, whole-image testing,
# ratios of multi-scale testing (0.5 to 1.75 with flips: `--tta`).
_base_ = [
    "../_base_/models/upernet_grootv.py",
    "../_base_/datasets/ade20k_grootv_512x512.py",
    "../_base_/schedules/ade20k_adamw_160k.py",
    "../_base_/segmentation_runtime.py",
]

model = dict(data_preprocessor=dict(size=(512, 512)))
