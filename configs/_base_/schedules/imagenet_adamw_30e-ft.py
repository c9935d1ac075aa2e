# Fine-tuning of a trained classifier at a higher resolution: 30 epochs at a total batch size of 512.
# The paper has no such recipe. All values are from Swin's fine-tuning at 384x384, because the published recipe
# of GrootV at 224x224 is also Swin's, except for EMA: 5 epochs of warm-up, learning rate 2e-5 for a batch size
# of 512, from 2e-8 to 2e-7, almost no weight decay, no EMA.
_base_ = "./imagenet_adamw_300e.py"

optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))

param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=5)
param_scheduler[1].update(eta_min=2e-7, begin=5, end=30)

train_cfg = dict(max_epochs=30)
custom_hooks = []

# 8 GPUs x 64 images.
auto_scale_lr = dict(base_batch_size=512)
