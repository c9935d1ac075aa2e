# Ablation of the paper, which does not describe it: a cross scan instead of the tree. Here, VMamba's four
# directions are two paths, row by row and column by column, each scanned both ways with the same weights;
# VMamba has separate weights for each direction.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="cross"))
