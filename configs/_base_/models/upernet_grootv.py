# UperNet as mmseg defines it for Swin (512 channels, FCN auxiliary head of 256 channels and weight
# 0.4, SyncBN); only the backbone is ours. Widths are those of GrootV-T.
_base_ = "mmseg::_base_/models/upernet_swin.py"

custom_imports = dict(imports=["grootvl_mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="grootvl_mm.GrootV",
        arch="tiny",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    ),
    decode_head=dict(in_channels=[80, 160, 320, 640], num_classes=150),
    auxiliary_head=dict(in_channels=320, num_classes=150),
)
