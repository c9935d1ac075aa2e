# Needs pretrained weights, as the 1x recipe does, which says how to pass them.
# Not stated in the paper: the augmentation beyond the short side of 480 to 800 (here DETR's resize and crop)
# and drop path (here 0.2, as in Swin-T).
_base_ = [
    "../_base_/models/mask-rcnn_grootv_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
