# Fine-tuning of a trained classifier at a higher resolution: 30 epochs at a total batch size of 512.
# The paper has no such recipe. All values are from Swin's fine-tuning at 384x384, because the published recipe
# of GrootV at 224x224 is also Swin's, except for EMA: 5 epochs of warm-up, learning rate 2e-5 for a batch size
# of 512, from 2e-8 to 2e-7, almost no weight decay, no EMA.
_base_ = "./imagenet_adamw_300e.py"

optim_wrapper = dict(optimizer=dict(lr=2e-5, weight_decay=1e-8))

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=2e-7,
        by_epoch=True,
        begin=5,
        end=30,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(max_epochs=30)
custom_hooks = []

# 8 GPUs x 64 images.
auto_scale_lr = dict(base_batch_size=512)
