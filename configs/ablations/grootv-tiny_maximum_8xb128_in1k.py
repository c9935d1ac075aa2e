# Not in the paper: the maximum spanning tree, which joins the neighbours that differ most.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="maximum"))
