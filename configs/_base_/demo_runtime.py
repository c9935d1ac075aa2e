# Runtime of the demo configs: a log line every 20 iterations and a checkpoint every 100, from which `--resume`
# continues a killed run. Each config adds its scope, its data, and its task's visualizer.
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=100, max_keep_ckpts=3),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
log_processor = dict(type="LogProcessor", by_epoch=False, window_size=20)

train_dataloader = dict(num_workers=1, persistent_workers=True, sampler=dict(type="InfiniteSampler", shuffle=True))
val_dataloader = dict(num_workers=1, persistent_workers=True, sampler=dict(type="DefaultSampler", shuffle=False))
test_dataloader = val_dataloader

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
randomness = dict(seed=0)
log_level = "INFO"
load_from = None
resume = False
