# After an ablation of the paper, which does not describe it: a cross scan in the place of the tree. Here: the
# four directions of VMamba as two paths scanned both ways, row by row and column by column, with the
# weights of one layer; VMamba has weights for each direction.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="cross"))
