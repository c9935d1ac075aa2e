# Folder, classes and colours of the demo data (tools/dataset_converters/make_demo_data.py).
data_root = "data/demo/"
digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
palette = [
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (170, 110, 40),
]
