_base_ = "./grootv_classifier.py"

model = dict(
    backbone=dict(arch="tiny", drop_path_rate=0.1),
    neck=dict(in_channels=640, out_channels=960),
    head=dict(in_channels=960),
)
