# Where the curve data lie (tools/dataset_converters/make_curve_data.py), and how pictures are scaled: a position of the
# map of stride 4 is then two pixels wide.
data_root = "data/curves/"
scale = 64
flips = dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])
