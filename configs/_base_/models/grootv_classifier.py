# Classifier: backbone, the published head (1x1 convolution, batch norm, GELU, pooling), linear layer.
# The files beside this one set `arch` and the channels: backbone 8 * C, neck 12 * C.
custom_imports = dict(imports=["grootvl_mm"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    backbone=dict(type="grootvl_mm.GrootV", out_indices=(3,)),
    neck=dict(type="grootvl_mm.GrootVNeck"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0),
    ),
    # One of the two per batch, with equal probability: the published "switch" probability of 0.5.
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)
