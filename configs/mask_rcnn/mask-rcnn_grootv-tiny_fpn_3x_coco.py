# As the 1x recipe, which also says how to give the pretrained weights it needs.
# Not stated in the paper: the augmentation beside the short side of 480 to 800 (DETR's resize and crop)
# and drop path (0.2, as Swin-T).
_base_ = [
    "../_base_/models/mask-rcnn_grootv_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/coco_adamw_3x.py",
    "mmdet::_base_/default_runtime.py",
]
