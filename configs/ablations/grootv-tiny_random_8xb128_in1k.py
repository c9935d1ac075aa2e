# Not in the paper: a random spanning tree instead of the minimum one; in training, a new one for each image and call.
# Any gain of the minimum tree over it comes from the image, not from trees as such.
_base_ = "../grootv/grootv-tiny_8xb128_in1k.py"

model = dict(backbone=dict(scan="random"))
