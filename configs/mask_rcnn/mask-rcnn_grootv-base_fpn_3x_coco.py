# The paper reports no detector with GrootV-B: this is the recipe of tiny and small. Drop path 0.5, as in its
# classifier; small also has that of its classifier.
_base_ = "./mask-rcnn_grootv-tiny_fpn_3x_coco.py"

model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
