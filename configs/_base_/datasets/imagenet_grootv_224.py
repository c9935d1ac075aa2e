# ImageNet-1K at 224x224 with Swin's augmentation (RandAugment m9-mstd0.5-inc1, random erasing 0.25).
# The published recipe also names colour jitter 0.4, but its augmentation library (timm) ignores it when
# RandAugment is on, so it is omitted here.
_base_ = "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py"

# The short side is resized to 224, not to the usual 256, before the centre crop.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=224, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]

train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
