# Not in the paper, which uses Mask R-CNN only: RetinaNet as in PVT and its successors, with the 1x recipe of our
# Mask R-CNN (weight decay 0.05; PVT has 0.0001). Start the backbone from ImageNet-1K weights (prefix: only for a
# classifier checkpoint written by mmpretrain):
#   --cfg-options model.backbone.init_cfg.type=Pretrained \
#                 model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.prefix=backbone.
_base_ = [
    "../_base_/models/retinanet_grootv_fpn.py",
    "../_base_/datasets/coco_detection_grootv.py",
    "../_base_/schedules/coco_adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
