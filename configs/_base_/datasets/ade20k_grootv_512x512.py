# ADE20K, crops of 512x512, 8 GPUs x 2 images.
_base_ = "mmseg::_base_/datasets/ade20k.py"

# Multi-scale and flip test (`--tta`). The ratios apply to the single-scale size of 2048x512, as in the
# tables of Swin and its heirs; mmseg's own pipeline applies them to the original image size.
img_ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(2048 * r), int(512 * r)), keep_ratio=True) for r in img_ratios],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]

train_dataloader = dict(batch_size=2)
