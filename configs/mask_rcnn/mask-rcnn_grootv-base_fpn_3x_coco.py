# The paper reports no detector with GrootV-B: its recipe is that of tiny and small. Drop path 0.5, that of
# its classifier, as small has it too.
_base_ = "./mask-rcnn_grootv-tiny_fpn_3x_coco.py"

model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
