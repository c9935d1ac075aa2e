# Variant in the paper: one tree per stage, shared by its blocks. The paper does not say which feature builds it;
# here, it is the input of the first block's state space model.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(tree_sharing="stage"))
