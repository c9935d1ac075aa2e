# Ablation of the paper, "last vertex" instead of all vertices: a single pass over trees rooted there. The
# paper does not say which of the two passes; here, it is "up": each vertex sees the subtree below it.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(tree_root="last", propagation="up"))
