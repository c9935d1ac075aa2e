# Which pixels belong to the marked curve? A single stage at stride 4, so that only the token mixers carry information
# along a curve: in a pyramid, the later stages see the whole image within a few positions.
_base_ = [
    "../_base_/datasets/demo_curves.py",
    "../_base_/schedules/demo_adamw_600i.py",
    "../_base_/demo_runtime.py",
]

default_scope = "mmseg"
custom_imports = dict(imports=["grootvl_mm"], allow_failed_imports=False)

model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5] * 3,
        std=[127.5] * 3,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(_base_.scale, _base_.scale),
    ),
    backbone=dict(type="grootvl_mm.GrootV", arch=dict(channels=32, depths=[3]), out_indices=(0,)),
    decode_head=dict(
        type="FCNHead",
        in_channels=32,
        in_index=0,
        channels=96,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=3,
        norm_cfg=dict(type="BN", requires_grad=True),
        align_corners=False,
        # Nine out of ten pixels are background.
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, class_weight=[0.2, 1.0, 1.0]),
        init_cfg=dict(type="Normal", std=0.1, override=dict(name="conv_seg")),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

optim_wrapper = dict(optimizer=dict(lr=2e-3))

data_root = _base_.data_root
metainfo = dict(classes=["background", "marked", "other"], palette=[(0, 0, 0), (230, 25, 75), (170, 170, 170)])
resize = dict(type="Resize", scale=(_base_.scale, _base_.scale))
train_dataloader = dict(
    batch_size=32,
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="images/train", seg_map_path="semantic/train"),
        img_suffix=".png",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            resize,
            _base_.flips,
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="images/val", seg_map_path="semantic/val"),
        img_suffix=".png",
        # Annotations are loaded after resizing, so the ground truth keeps the size of the image file.
        pipeline=[
            dict(type="LoadImageFromFile"),
            resize,
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = val_dataloader

# Evaluated on curve pixels only: a model that finds the curves but cannot follow them scores 50 %.
val_evaluator = dict(type="IoUMetric", ignore_index=0, iou_metrics=["mIoU"])
test_evaluator = val_evaluator

default_hooks = dict(visualization=dict(type="SegVisualizationHook"))
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer")
