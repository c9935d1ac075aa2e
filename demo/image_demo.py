"""Draw the predictions of a detector, segmenter or classifier on an image, a folder of images, or a video.

    python demo/image_demo.py street.jpg mask-rcnn_grootv-tiny_fpn_1x_coco detector.pth --out-dir outputs

Images keep their names, a video becomes an MP4 file. The task depends on the config's default_scope.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.infer import BaseInferencer
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from tqdm import tqdm

from grootvl_mm.apis import cli, zoo
from grootvl_mm.apis.images import IMAGE_SUFFIXES, decode_image, find_images, read_image
from grootvl_mm.apis.whole_files import whole_file

FPS = 25.0  # for videos without a frame rate

# Name and image, (H, W, 3), BGR, uint8.
Frame = tuple[str, np.ndarray]
# From such an image to an RGB image with the prediction: the inferencers read BGR, but draw on RGB.
Draw = Callable[[np.ndarray], np.ndarray]


class Input(NamedTuple):
    """Frames to process."""

    frames: Iterator[Frame]
    count: int | None  # None for a video of unknown length
    video_fps: float | None  # None for images


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="image, folder of images, or video")
    cli.add_config_arguments(parser, "path of a config file, or model name in the zoo of grootvl_mm")
    parser.add_argument("checkpoint", nargs="?", help="path of the checkpoint (default: load_from of the config)")
    parser.add_argument(
        "--out-dir", type=Path, default=Path("outputs"), help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("--device", help="device of the model, e.g. cuda:1 (default: a GPU if there is one, else cpu)")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="minimum score of the detections drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--frames", action="store_true", help="also write each frame of a video as an image (default: off)"
    )
    parser.add_argument("--show", action="store_true", help="also show the predictions in a window (default: off)")
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds for which --show shows each image (default: %(default)s)"
    )
    return parser.parse_args()


def open_input(path: Path) -> Input:
    """Open an image, a folder or a video, or exit with an error."""
    if not path.exists():
        cli.fail(f"input '{path}' does not exist; give an image, a folder of images or a video")
    if path.is_dir():
        paths = find_images([path])
        return Input(((child.name, read_image(child)) for child in paths), len(paths), None)
    # OpenCV would also open an image that is cut off as a video.
    image = read_image(path) if path.suffix.lower() in IMAGE_SUFFIXES else decode_image(path)
    if image is not None:
        return Input(iter([(path.name, image)]), 1, None)
    video = mmcv.VideoReader(str(path))
    if not video.opened or not video.width:
        cli.fail(f"OpenCV cannot read '{path}', neither as an image nor as a video")
    frames = ((f"{index:06d}.png", frame) for index, frame in enumerate(video))
    return Input(frames, max(video.frame_cnt, 0) or None, video.fps or FPS)


def find_config(model: str) -> str:
    """The config file of a model given by path or name."""
    if Path(model).suffix == ".py" or Path(model).is_file():
        return model
    try:
        return zoo.config_file(model)
    except (ValueError, FileNotFoundError) as error:
        cli.fail(f"{error}; or give the path of a config file")


def find_checkpoint(checkpoint: str | None, cfg: Config) -> str:
    """The checkpoint from the command line or the config."""
    checkpoint = checkpoint or cfg.get("load_from")
    if checkpoint is None:
        cli.fail("no checkpoint; give its path after the config or set load_from (this project publishes no weights)")
    cli.check_file(checkpoint, "checkpoint", "give the path of a .pth file, e.g. from work_dirs/")
    return checkpoint


def check_device(device: str) -> str:
    """Exit with an error if ``device`` cannot be used."""
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        cli.fail(f"cannot use the device {device!r}: {str(error).splitlines()[0]}")
    return device


def complete(inferencer: BaseInferencer, checkpoint: str) -> BaseInferencer:
    """Load the checkpoint again and exit with an error if it lacks weights, which the inferencers only log.

    The inferencers have to load it themselves too, because they read classes and colours from it.
    """
    cli.load_weights(inferencer.model, checkpoint)
    return inferencer


def detector(cfg: Config, checkpoint: str, args: argparse.Namespace) -> Draw:
    """Draw boxes and masks."""
    from mmdet.apis import DetInferencer

    inferencer = complete(DetInferencer(cfg, checkpoint, args.device, show_progress=False), checkpoint)
    options = {"return_vis": True, "pred_score_thr": args.score_thr, "show": args.show, "wait_time": args.wait_time}

    def draw(picture: np.ndarray) -> np.ndarray:
        samples = inferencer(picture, return_datasamples=True)["predictions"]
        return inferencer.visualize([mmcv.bgr2rgb(picture)], samples, **options)[0]

    return draw


def segmenter(cfg: Config, checkpoint: str, args: argparse.Namespace) -> Draw:
    """Draw a class map."""
    from mmseg.apis import MMSegInferencer

    inferencer = complete(MMSegInferencer(cfg, checkpoint, device=args.device), checkpoint)
    inferencer.show_progress = False
    options = {"return_vis": True, "show": args.show, "wait_time": args.wait_time}

    def draw(picture: np.ndarray) -> np.ndarray:
        sample = inferencer(picture, return_datasamples=True)
        return inferencer.visualize([mmcv.bgr2rgb(picture)], [sample], **options)[0]

    return draw


def classifier(cfg: Config, checkpoint: str, args: argparse.Namespace) -> Draw:
    """Write the class and its score."""
    from mmpretrain import ImageClassificationInferencer
    from mmpretrain.utils import progress
    from mmpretrain.visualization import UniversalVisualizer

    progress.disable_progress_bar = True
    inferencer = complete(ImageClassificationInferencer(cfg, checkpoint, args.device), checkpoint)
    visualizer = UniversalVisualizer()
    options = {"classes": inferencer.classes, "show": args.show, "wait_time": args.wait_time}

    def draw(picture: np.ndarray) -> np.ndarray:
        (sample,) = inferencer(picture, return_datasamples=True)
        return visualizer.visualize_cls(mmcv.bgr2rgb(picture), sample, **options)

    return draw


TASKS: dict[str, Callable[[Config, str, argparse.Namespace], Draw]] = {
    "mmdet": detector,
    "mmseg": segmenter,
    "mmpretrain": classifier,
}


def make_folder(folder: Path, source: Path) -> None:
    """Create the folder for the results, none of which may be a file of the input, also through links."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cli.fail(f"cannot create the folder --out-dir '{folder}': {error.strerror}")
    files = find_images([source]) if source.is_dir() else [source]
    results = {os.path.realpath(folder / file.name) for file in files}
    same_folder = folder.resolve() == (source if source.is_dir() else source.parent).resolve()
    if same_folder or not results.isdisjoint(map(os.path.realpath, files)):
        cli.fail(f"--out-dir '{folder}' is the folder of the input, whose files would be overwritten; give another one")


def write_image(path: Path, image: np.ndarray) -> Path:
    """Write an RGB image; as PNG if OpenCV cannot write the format of the name."""
    pixels = mmcv.rgb2bgr(image)
    is_encoded, content = cv2.imencode(path.suffix, pixels) if cv2.haveImageWriter(f"a{path.suffix}") else (False, b"")
    if not is_encoded:
        path, (_, content) = path.with_name(f"{path.name}.png"), cv2.imencode(".png", pixels)
    with whole_file(path) as partial:
        partial.write_bytes(content)
    return path


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a frame; the file gets its name once it is complete."""
    writer = cv2.VideoWriter()
    with whole_file(path) as partial:

        def write(frame: np.ndarray) -> None:
            if not writer.isOpened():
                height, width = frame.shape[:2]
                if not writer.open(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height)):
                    cli.fail(f"OpenCV cannot write the video {path}; extract its frames and pass their folder as input")
            writer.write(mmcv.rgb2bgr(frame))

        try:
            yield write
            if not writer.isOpened():
                cli.fail("OpenCV cannot read any frame of the video; check the file")
        finally:
            writer.release()


def draw_all(source: Input, draw: Draw, args: argparse.Namespace) -> Path:
    """Draw on every image or frame of the input; return the output file or folder."""
    frames = tqdm(source.frames, total=source.count, unit="image" if source.video_fps is None else "frame")
    if source.video_fps is None:
        for name, image in frames:
            written = write_image(args.out_dir / name, draw(image))
        return written if source.count == 1 else args.out_dir
    video = args.out_dir / f"{args.input.stem}.mp4"
    if args.frames:
        (args.out_dir / args.input.stem).mkdir(exist_ok=True)
    with video_writer(video, source.video_fps) as write:
        for name, image in frames:
            drawn = draw(image)
            write(drawn)
            if args.frames:
                write_image(args.out_dir / args.input.stem / name, drawn)
    return video


def main() -> None:
    """Run the command."""
    args = parse_args()
    cfg = cli.load_config(find_config(args.config), args.cfg_options)
    checkpoint = find_checkpoint(args.checkpoint, cfg)
    source = open_input(args.input)
    args.device = check_device(args.device or get_device())
    make_folder(args.out_dir, args.input)
    init_default_scope(cfg.default_scope)
    (cfg.get("visualizer") or {}).pop("vis_backends", None)  # this script writes the images itself
    with cli.checkpoint_errors(checkpoint):
        draw = TASKS[cfg.default_scope](cfg, checkpoint, args)
    with cli.file_errors(args.out_dir):
        written = draw_all(source, draw, args)
    MMLogger.get_instance("image_demo").info("Wrote %s", written)


if __name__ == "__main__":
    main()
