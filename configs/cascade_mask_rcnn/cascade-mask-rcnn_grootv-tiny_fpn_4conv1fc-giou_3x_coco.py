# Not of the paper, which has Mask R-CNN only: the detector of the tables of Swin and ConvNeXt, with the 3x
# recipe of our Mask R-CNN (Swin, too, has one recipe for both). The backbone starts from ImageNet-1K
# weights; give yours (prefix: only for a checkpoint of a classifier that mmpretrain wrote):
#   --cfg-options model.backbone.init_cfg.type=Pretrained \
#                 model.backbone.init_cfg.checkpoint=FILE model.backbone.init_cfg.prefix=backbone.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_grootv_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
