# After an ablation of the paper, which does not describe it: a raster scan in the place of the tree. Here: the
# path row by row, in both directions as the tree; `propagation="down"` leaves one.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="raster"))
