# In the paper, the backbone starts from ImageNet-1K weights, without which this recipe does not reach the
# published results (prefix: only for a classifier checkpoint written by mmpretrain):
#   --cfg-options model.backbone.init_cfg.type=Pretrained \
#                 model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.prefix=backbone.
# Not stated in the paper: drop path (here 0.2, as in Swin-T).
_base_ = [
    "../_base_/models/mask-rcnn_grootv_fpn.py",
    "../_base_/datasets/coco_instance_grootv.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
