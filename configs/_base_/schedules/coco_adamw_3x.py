# 36 epochs. Not stated in the paper: the epochs of the learning rate steps (27, 33, as in Swin).
_base_ = "./coco_adamw_1x.py"

param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=1000)
param_scheduler[1].update(end=36, milestones=[27, 33])

train_cfg = dict(max_epochs=36)
