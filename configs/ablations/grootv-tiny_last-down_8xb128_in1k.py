# Ablation of the paper, "last vertex" instead of all vertices: a single pass over trees rooted there. The
# paper does not say which of the two passes; here, it is "down": each vertex sees its path to the root.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(tree_root="last", propagation="down"))
