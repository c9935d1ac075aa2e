# ImageNet-22K (all 21,841 classes of the fall 2011 release; mmpretrain calls it 21k) at 384x384, with the
# augmentation of ImageNet-1K. It has no validation split.
_base_ = "./imagenet_grootv_384.py"

data_preprocessor = dict(num_classes=21841)

train_dataloader = dict(dataset=dict(type="ImageNet21k", data_root="data/imagenet21k"))
val_dataloader = None
val_evaluator = None
test_dataloader = None
test_evaluator = None
