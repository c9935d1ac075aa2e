# Folder of the curve data (tools/dataset_converters/make_curve_data.py), and the size to which images are scaled: a
# position of the stride-4 map then covers two pixels of the original.
data_root = "data/curves/"
scale = 64
flips = dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"])
