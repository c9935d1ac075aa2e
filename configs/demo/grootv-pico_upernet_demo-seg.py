# UperNet with GrootV-pico on the semantic maps of the demo scenes: background and ten digits.
_base_ = [
    "../_base_/models/upernet_grootv.py",
    "../_base_/datasets/demo_digits.py",
    "../_base_/schedules/demo_adamw_600i.py",
    "../_base_/demo_runtime.py",
]

default_scope = "mmseg"

# Plain batch norm: SyncBN needs a GPU.
norm_cfg = dict(type="BN", requires_grad=True)
# Initial weights of the classifier are ten times mmseg's default, which passes on almost no gradient at first.
init_cfg = dict(type="Normal", std=0.1, override=dict(name="conv_seg"))
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(arch="pico", drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[24, 48, 96, 192],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
    auxiliary_head=dict(
        in_channels=96,
        channels=32,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
)

# An iteration takes half as long as the detector's, and segmentation needs more of them.
max_iters = 1500
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]

data_root = _base_.data_root
metainfo = dict(classes=["background", *_base_.digits], palette=[(0, 0, 0), *_base_.palette])
# No flips, not even in multi-scale testing: a mirrored digit is a different digit or none.
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=r, keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]

train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="images/train", seg_map_path="semantic/train"),
        img_suffix=".png",
        pipeline=pipeline,
    ),
)
# Multi-scale testing needs a batch size of 1.
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="images/val", seg_map_path="semantic/val"),
        img_suffix=".png",
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

default_hooks = dict(visualization=dict(type="SegVisualizationHook"))
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
