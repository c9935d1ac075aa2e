_base_ = "./grootv_classifier.py"

model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5),
    neck=dict(in_channels=1024, out_channels=1536),
    head=dict(in_channels=1536),
)
