# Not of the paper: the authors announce GrootV-L without its size. Taken: the depths of small and base,
# and twice the width of small, as Swin-L and ConvNeXt-L have it; that gives 197 M parameters, as theirs.
# Drop path 0.2, as Swin-L: with ImageNet-22K there is less to hold back than with ImageNet-1K.
_base_ = "./grootv_classifier.py"

model = dict(
    backbone=dict(arch="large", drop_path_rate=0.2),
    neck=dict(in_channels=1536, out_channels=2304),
    head=dict(in_channels=2304),
)
