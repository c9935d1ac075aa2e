# 90 epochs at a total batch size of 4,096.
# The paper has no such recipe. All values are from Swin's pre-training on ImageNet-22K: learning rate 1e-3 for
# this batch size, from 1e-6 to 1e-5, 5 epochs of warm-up, no EMA.
_base_ = "./imagenet_adamw_300e.py"

param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=5)
param_scheduler[1].update(begin=5, end=90)

train_cfg = dict(max_epochs=90)
# ImageNet-22K has no validation split.
val_cfg = None
test_cfg = None
custom_hooks = []

# 64 GPUs x 64 images.
auto_scale_lr = dict(base_batch_size=4096)
