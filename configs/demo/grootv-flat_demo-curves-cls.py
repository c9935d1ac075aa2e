# Are the two marks at the ends of one curve? The backbone is that of grootv-flat_demo-curves-seg.py.
_base_ = [
    "../_base_/models/grootv_pico.py",
    "../_base_/datasets/demo_curves.py",
    "../_base_/schedules/demo_adamw_600i.py",
    "../_base_/demo_runtime.py",
]

default_scope = "mmpretrain"

model = dict(
    backbone=dict(arch=dict(_delete_=True, channels=32, depths=[3]), out_indices=(0,)),
    neck=dict(in_channels=32, out_channels=96),
    head=dict(in_channels=96, num_classes=2),
)

data_preprocessor = dict(num_classes=2, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)

optim_wrapper = dict(optimizer=dict(lr=2e-3))

metainfo = dict(classes=["apart", "joined"])
data_root = _base_.data_root + "classification/"
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        type="CustomDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix="train",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=_base_.scale),
            _base_.flips,
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    dataset=dict(
        type="CustomDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix="val",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=_base_.scale),
            dict(type="PackInputs"),
        ],
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=1)
test_evaluator = val_evaluator

default_hooks = dict(visualization=dict(type="VisualizationHook", enable=False))
visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
