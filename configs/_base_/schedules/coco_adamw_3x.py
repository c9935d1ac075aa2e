# 36 epochs. Not stated in the paper: the epochs of the learning rate steps (27, 33, as in Swin).
_base_ = "./coco_adamw_1x.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

train_cfg = dict(max_epochs=36)
