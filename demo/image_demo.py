"""Draw what a detector, segmenter or classifier finds in a picture, the pictures of a folder, or a video.

    python demo/image_demo.py street.jpg mask-rcnn_grootv-tiny_fpn_1x_coco detector.pth --out-dir outputs

Pictures keep their names, a video becomes an MP4 file. The config's default_scope says which task it is.
"""

import argparse
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

from grootvl_mm import zoo
from grootvl_mm.apis import cli
from grootvl_mm.apis.images import IMAGE_SUFFIXES
from grootvl_mm.apis.whole_files import whole_file

FPS = 25.0  # of a video that does not tell its own

# Name and picture, (H, W, 3), BGR, uint8.
Frame = tuple[str, np.ndarray]
# From such a picture to one with the prediction on it, RGB: the inferencers read BGR, but draw on RGB.
Draw = Callable[[np.ndarray], np.ndarray]


class Input(NamedTuple):
    """Frames to process."""

    frames: Iterator[Frame]
    count: int | None  # None for a video that does not tell
    video_fps: float | None  # None for pictures


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="picture, folder of pictures, or video")
    cli.add_config_arguments(parser, "path of a config file, or name of a model of grootvl_mm")
    parser.add_argument("checkpoint", nargs="?", help="path of the checkpoint (default: load_from of the config)")
    parser.add_argument("--out-dir", type=Path, default=Path("outputs"), help="default: %(default)s")
    parser.add_argument("--device", help="for example cuda:1 (default: cuda if there is a GPU, else cpu)")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="lowest score of a drawn detection (default: %(default)s)"
    )
    parser.add_argument("--frames", action="store_true", help="write each frame of a video as a picture, too")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window, too")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that --show shows each picture")
    return parser.parse_args()


def open_input(path: Path) -> Input:
    """Open a picture, a folder or a video, or fail."""
    if not path.exists():
        cli.fail(f"input '{path}' does not exist; give a picture, a folder of pictures or a video")
    if path.is_dir():
        paths = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            cli.fail(f"the folder '{path}' has no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return Input(((child.name, read_picture(child)) for child in paths), len(paths), None)
    picture = decode(path)
    if picture is not None:
        return Input(iter([(path.name, picture)]), 1, None)
    video = mmcv.VideoReader(str(path))
    if not video.opened or not video.width:
        cli.fail(f"'{path}' is neither a picture nor a video that OpenCV can read")
    frames = ((f"{index:06d}.png", frame) for index, frame in enumerate(video))
    return Input(frames, max(video.frame_cnt, 0) or None, video.fps or FPS)


def read_picture(path: Path) -> np.ndarray:
    """Read a file that must be a picture."""
    picture = decode(path)
    if picture is None:
        cli.fail(f"'{path}' is no picture that OpenCV can read; remove it or repair it")
    return picture


def decode(path: Path) -> np.ndarray | None:
    """The picture in a file, or None."""
    return mmcv.imread(path) if cv2.haveImageReader(str(path)) else None


def find_config(model: str) -> str:
    """The config file of a model that was given by path or by name."""
    if Path(model).suffix == ".py" or Path(model).is_file():
        return model
    try:
        return zoo.config_file(model)
    except (ValueError, FileNotFoundError) as error:
        cli.fail(f"{error}; or give the path of a config file")


def find_checkpoint(checkpoint: str | None, cfg: Config) -> str:
    """The checkpoint of the command line or of the config."""
    checkpoint = checkpoint or cfg.get("load_from")
    if checkpoint is None:
        cli.fail("no checkpoint; give its path after the model (this project publishes no weights)")
    cli.check_file(checkpoint, "checkpoint", "give the path of a .pth file, e.g. from work_dirs/")
    return checkpoint


def check_device(device: str) -> str:
    """Fail if nothing can be computed on ``device``."""
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        cli.fail(f"cannot use the device {device!r}: {str(error).splitlines()[0]}")
    return device


def complete(inferencer: BaseInferencer, checkpoint: str) -> BaseInferencer:
    """Fail if the checkpoint left weights of the model random, which the inferencers only log.

    They load it by themselves, as they take classes and colours from it, too; this loads it once more.
    """
    cli.load_weights(inferencer.model, checkpoint)
    return inferencer


def detector(cfg: Config, checkpoint: str, args: argparse.Namespace) -> Draw:
    """Boxes and masks."""
    from mmdet.apis import DetInferencer

    inferencer = complete(DetInferencer(cfg, checkpoint, args.device, show_progress=False), checkpoint)
    options = {"return_vis": True, "pred_score_thr": args.score_thr, "show": args.show, "wait_time": args.wait_time}

    def draw(picture: np.ndarray) -> np.ndarray:
        samples = inferencer(picture, return_datasamples=True)["predictions"]
        return inferencer.visualize([mmcv.bgr2rgb(picture)], samples, **options)[0]

    return draw


def segmenter(cfg: Config, checkpoint: str, args: argparse.Namespace) -> Draw:
    """A class map."""
    from mmseg.apis import MMSegInferencer

    inferencer = complete(MMSegInferencer(cfg, checkpoint, device=args.device), checkpoint)
    inferencer.show_progress = False
    options = {"return_vis": True, "show": args.show, "wait_time": args.wait_time}

    def draw(picture: np.ndarray) -> np.ndarray:
        sample = inferencer(picture, return_datasamples=True)
        return inferencer.visualize([mmcv.bgr2rgb(picture)], [sample], **options)[0]

    return draw


def classifier(cfg: Config, checkpoint: str, args: argparse.Namespace) -> Draw:
    """The class with its score."""
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
    """Make the folder for the results, which must not be that of the input, whose files have the same names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cli.fail(f"cannot make the folder --out-dir '{folder}': {error.strerror}")
    if folder.resolve() == (source if source.is_dir() else source.parent).resolve():
        cli.fail(f"--out-dir '{folder}' is the folder of the input, whose files would be lost; give another one")


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Write a picture (RGB), whole or not at all; as PNG where OpenCV cannot write the format of the name."""
    if not cv2.haveImageWriter(path.name):
        path = path.with_name(f"{path.name}.png")
    with whole_file(path) as partial:
        partial.write_bytes(cv2.imencode(path.suffix, mmcv.rgb2bgr(picture))[1])
    return path


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends a frame; the file gets its name when all of them are written."""
    writer = cv2.VideoWriter()
    with whole_file(path) as partial:

        def write(frame: np.ndarray) -> None:
            if not writer.isOpened():
                height, width = frame.shape[:2]
                if not writer.open(str(partial), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height)):
                    cli.fail(
                        f"OpenCV cannot write the video {path}; give --frames and the pictures of a folder instead"
                    )
            writer.write(mmcv.rgb2bgr(frame))

        try:
            yield write
            if not writer.isOpened():
                cli.fail("no frame of the video can be read")
        finally:
            writer.release()


def draw_all(source: Input, draw: Draw, args: argparse.Namespace) -> Path:
    """Draw on every picture of the input; returns what was written."""
    frames = tqdm(source.frames, total=source.count, unit="picture" if source.video_fps is None else "frame")
    if source.video_fps is None:
        for name, picture in frames:
            written = write_picture(args.out_dir / name, draw(picture))
        return written if source.count == 1 else args.out_dir
    video = args.out_dir / f"{args.input.stem}.mp4"
    if args.frames:
        (args.out_dir / args.input.stem).mkdir(exist_ok=True)
    with video_writer(video, source.video_fps) as write:
        for name, picture in frames:
            drawn = draw(picture)
            write(drawn)
            if args.frames:
                write_picture(args.out_dir / args.input.stem / name, drawn)
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
    cfg.get("visualizer", {}).pop("vis_backends", None)  # the pictures are written here
    with cli.checkpoint_errors(checkpoint):
        draw = TASKS[cfg.default_scope](cfg, checkpoint, args)
    with cli.file_errors(args.out_dir):
        written = draw_all(source, draw, args)
    MMLogger.get_instance("image_demo").info("%s", written)


if __name__ == "__main__":
    main()
