# Not stated in the paper: drop path (here 0.3).
_base_ = "./mask-rcnn_grootv-tiny_fpn_3x_coco.py"

model = dict(
    backbone=dict(arch="small", drop_path_rate=0.3),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
