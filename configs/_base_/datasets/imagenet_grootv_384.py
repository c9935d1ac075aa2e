# ImageNet-1K at 384x384, otherwise as at 224x224. (Swin tests on the whole image, squeezed into a 384x384
# square; here, the test uses the centre crop, as at 224x224.)
_base_ = "./imagenet_grootv_224.py"

train_pipeline = _base_.train_pipeline
train_pipeline[1].update(scale=384)  # RandomResizedCrop

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=384, edge="short", backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=384),
    dict(type="PackInputs"),
]

train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
