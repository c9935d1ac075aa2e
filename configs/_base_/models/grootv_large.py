# Not in the paper: the authors announce GrootV-L without stating its size. We chose the depths of small and
# base and twice the channels of small, like Swin-L and ConvNeXt-L, which gives 197 M parameters, as theirs.
# Drop path 0.2, as in Swin-L: ImageNet-22K needs less regularization than ImageNet-1K.
_base_ = "./grootv_classifier.py"

model = dict(
    backbone=dict(arch="large", drop_path_rate=0.2),
    neck=dict(in_channels=1536, out_channels=2304),
    head=dict(in_channels=2304),
)
