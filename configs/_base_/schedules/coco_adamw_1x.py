# 12 epochs at a total batch size of 16.
# Not stated in the paper, taken from Swin and VMamba: weight decay (0.05), epochs of the learning rate steps
# (8, 11), layer-wise learning rate decay (none). No weight decay for norms, biases and the other
# one-dimensional parameters (A_log, Ds).
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

# 8 GPUs x 2 images; `--auto-scale-lr` scales the learning rate to other batch sizes.
auto_scale_lr = dict(enable=False, base_batch_size=16)
