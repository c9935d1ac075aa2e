# Classification with GrootV-pico: the digit that fills a crop of the demo scenes.
_base_ = [
    "../_base_/models/grootv_pico.py",
    "../_base_/datasets/demo_digits.py",
    "../_base_/schedules/demo_adamw_600i.py",
    "../_base_/demo_runtime.py",
]

default_scope = "mmpretrain"

model = dict(head=dict(num_classes=10))

data_preprocessor = dict(num_classes=10, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

# No flips: a mirrored digit is a different digit or none.
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=64),
    dict(type="PackInputs"),
]

# Folders are numbered in alphabetical order, so the names are in that order too.
metainfo = dict(classes=sorted(_base_.digits))
data_root = _base_.data_root + "classification/"
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        type="CustomDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix="train",
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        type="CustomDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix="val",
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator

default_hooks = dict(visualization=dict(type="VisualizationHook", enable=False))
visualizer = dict(type="UniversalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
