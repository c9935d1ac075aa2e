_base_ = "./grootv_classifier.py"

model = dict(
    backbone=dict(arch="small", drop_path_rate=0.3),
    neck=dict(in_channels=768, out_channels=1152),
    head=dict(in_channels=1152),
)
