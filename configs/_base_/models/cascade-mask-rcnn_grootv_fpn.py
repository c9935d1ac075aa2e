# mmdet's Cascade Mask R-CNN with FPN, with the box heads of the Swin and ConvNeXt papers: four convolutions
# with SyncBN, one linear layer, class-specific boxes and the GIoU loss. Channels are those of GrootV-T.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"

custom_imports = dict(imports=["grootvl_mm"], allow_failed_imports=False)

bbox_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
# Each stage of the cascade refines the boxes of the one before, so its offsets are smaller.
stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]

model = dict(
    backbone=dict(
        _delete_=True,
        type="grootvl_mm.GrootV",
        arch="tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
        ignore_padding=True,
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
    roi_head=dict(
        bbox_head=[
            dict(bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=std), **bbox_head)
            for std in stds
        ],
    ),
)
