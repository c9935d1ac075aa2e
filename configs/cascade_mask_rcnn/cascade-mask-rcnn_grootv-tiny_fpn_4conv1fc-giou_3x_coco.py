# Not in the paper, which uses Mask R-CNN only: the detector in the tables of Swin and ConvNeXt, with the 3x recipe
# of our Mask R-CNN (Swin also has one recipe for both). Start the backbone from ImageNet-1K weights (prefix: only
# for a classifier checkpoint written by mmpretrain):
#   --cfg-options model.backbone.init_cfg.type=Pretrained \
#                 model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.prefix=backbone.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_grootv_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
