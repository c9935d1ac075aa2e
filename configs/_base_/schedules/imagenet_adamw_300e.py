# 300 epochs at a total batch size of 1,024.
# No weight decay for biases, norms and all other one-dimensional parameters. That includes A_log and the bias
# of dt_proj, which the published code stores with two dimensions and therefore decays.
optim_wrapper = dict(
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0),
)

param_scheduler = [
    # From 1e-6.
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Validation and the published accuracy use the EMA weights (decay 0.9999).
custom_hooks = [
    dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL"),
    # Lets a run start from a published file and evaluate that file's EMA weights, if it has any.
    dict(type="grootvl_mm.PublishedCheckpointHook"),
]

# 8 GPUs x 128 images.
auto_scale_lr = dict(base_batch_size=1024)
