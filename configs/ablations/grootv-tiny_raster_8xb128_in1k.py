# Ablation of the paper, which does not describe it: a raster scan instead of the tree. Here, it is the row-by-row
# path in both directions, like the tree; `propagation="down"` scans one direction.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="raster"))
