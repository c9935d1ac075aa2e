# Not in the paper: the size for demos and tests on the CPU. No mixup, CutMix or drop path, because it is
# trained for minutes, not for 300 epochs.
_base_ = "./grootv_classifier.py"

model = dict(
    backbone=dict(arch="pico", drop_path_rate=0.0),
    neck=dict(in_channels=192, out_channels=288),
    head=dict(in_channels=288),
    train_cfg=dict(_delete_=True),
)
