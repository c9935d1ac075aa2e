# mmdet's RetinaNet with FPN; only the backbone is ours. The pyramid starts at stride 8, so the backbone does
# not return its first feature map. Channels are those of GrootV-T.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"

custom_imports = dict(imports=["grootvl_mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="grootvl_mm.GrootV",
        arch="tiny",
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        ignore_padding=True,
    ),
    neck=dict(in_channels=[160, 320, 640], start_level=0),
)
