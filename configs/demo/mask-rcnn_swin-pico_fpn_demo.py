# Baseline for the demo: a Swin Transformer with the same depths and channels, all else equal.
_base_ = "./mask-rcnn_grootv-pico_fpn_demo.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=24,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=7,
        drop_path_rate=0.0,
    ),
)
