# mmdet's Mask R-CNN with FPN; only the backbone is ours. Channels are those of GrootV-T.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

custom_imports = dict(imports=["grootvl_mm"], allow_failed_imports=False)

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
)
