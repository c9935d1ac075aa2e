# Variant of the paper: one tree per stage, shared by its blocks. Not stated: which feature builds it. Here:
# the input of the first block's state space model.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(tree_sharing="stage"))
