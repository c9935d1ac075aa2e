# Not stated in the paper: drop path (here 0.3).
_base_ = "./grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="small", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
