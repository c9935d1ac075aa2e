# Ablation of the paper: trees from the Manhattan distance of the features.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(tree_metric="manhattan"))
