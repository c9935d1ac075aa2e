# The paper reports no segmenter with GrootV-B: this is the recipe of tiny and small. Drop path 0.5, as in its
# classifier; small also has that of its classifier.
_base_ = "./grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
