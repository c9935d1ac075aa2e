# Baseline for the demo: a ConvNeXt with the same depths and channels, all else equal.
_base_ = "./mask-rcnn_grootv-pico_fpn_demo.py"

custom_imports = dict(imports=["grootvl_mm", "mmpretrain.models"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmpretrain.ConvNeXt",
        arch=dict(depths=[1, 1, 2, 1], channels=[24, 48, 96, 192]),
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
        # As in GrootV, whose residual branches start at full strength; the default, 1e-6, needs long training.
        layer_scale_init_value=1.0,
    ),
)
