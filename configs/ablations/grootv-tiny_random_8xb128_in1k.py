# Not of the paper: a random spanning tree in the place of the minimum one, in training a new one for each image and
# call. What the tree gains over it comes from the picture, not from trees as such.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="random"))
