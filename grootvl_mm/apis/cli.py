"""What ``tools/train.py``, ``tools/test.py`` and the tools that load a model have in common."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed

from grootvl_mm.apis.cfg_options import CfgOptions
from grootvl_mm.apis.checkpoint_files import CheckpointError, read_checkpoint
from grootvl_mm.apis.cpu import adapt_to_cpu
from grootvl_mm.engine.hooks.global_loss_hook import GlobalLossHook

# default_scope of the config -> pip names of the package that serves the task: OpenMMLab's and that of the onedl stack
HOSTS = {
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}


def fail(message: str) -> NoReturn:
    """End the command with one clear line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}")


def add_config_arguments(parser: argparse.ArgumentParser, config_help: str = "path of the config file") -> None:
    """Add ``config`` and ``--cfg-options``."""
    parser.add_argument("config", help=config_help)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=CfgOptions,
        metavar="KEY=VALUE",
        help='override settings of the config, e.g. train_cfg.max_iters=100, load_from="my work/a.pth"; lists as '
        'key=a,b or key="[a, b]"',
    )


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what training and testing share: work dir and launcher, with the hosts' names."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/CONFIG_NAME)")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed run were started",
    )
    # Launchers of different ages spell it differently; the value itself is read from LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def check_file(path: str, what: str, hint: str) -> None:
    """Fail if ``path`` is neither a file nor an address that mmengine can fetch."""
    if "://" not in path and not Path(path).is_file():
        fail(f"{what} {path!r} does not exist (or is no file); {hint}")


@contextmanager
def checkpoint_errors(path: str | None = None) -> Iterator[None]:
    """Fail with one clear line where a checkpoint cannot be read or does not fit the model.

    Args:
        path: The checkpoint, where there is one for the whole model. It is looked at again only after an error.
    """
    try:
        yield
    except CheckpointError as error:
        fail(f"{path}: {error}" if path else str(error))
    except Exception:
        if path is not None and Path(path).is_file():
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                fail(str(error))
        raise


def load_config(path: str, cfg_options: dict | None = None) -> Config:
    """Load a config of one of the three tasks and merge the overrides of the command line.

    Args:
        path: Path of the config file.
        cfg_options: Overrides, dotted key to value.

    Returns:
        The config; its ``default_scope`` is a key of :data:`HOSTS` whose package is installed.
    """
    check_file(path, "config", "give the path of a config file, e.g. one in configs/")
    cfg = Config.fromfile(path)
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    scope = cfg.get("default_scope")
    if scope not in HOSTS:
        came = "no default_scope" if scope is None else f"default_scope={scope!r}"
        fail(
            f"{path} has {came}; expected one of {', '.join(map(repr, HOSTS))}, which says whether "
            "the config is about detection, segmentation or classification"
        )
    if find_spec(scope) is None:
        name, onedl_name = HOSTS[scope]
        fail(
            f"{path} needs {scope} (its default_scope), which is not installed; run: mim install {name} "
            f"(with onedl-mim: {onedl_name})"
        )
    return cfg


def prepare_runner_config(args: argparse.Namespace) -> Config:
    """Load the config of a run and apply the arguments of :func:`add_runner_arguments`."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    if cfg.default_scope == "mmpretrain":
        _set_classification_loaders(cfg)
    return cfg


def finish_runner_config(cfg: Config) -> None:
    """Fit a complete run config to the device and the launcher; call it right before ``Runner``."""
    if cfg.launcher != "none":
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), {"type": f"grootvl_mm.{GlobalLossHook.__name__}"}]
    if get_device() == "cpu":
        try:
            adapt_to_cpu(cfg)
        except ValueError as error:
            fail(str(error))


def close_process_group() -> None:
    """Leave the process group, which torch warns about if it is forgotten."""
    if is_distributed():
        torch.distributed.destroy_process_group()


def _set_classification_loaders(cfg: Config) -> None:
    """Give the data loaders the defaults that mmpretrain's own tools give them."""
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = cfg.get(name)
        if loader is not None:
            loader.setdefault("collate_fn", {"type": "default_collate"})
            loader.setdefault("pin_memory", torch.cuda.is_available())
            loader.setdefault("persistent_workers", loader.get("num_workers", 0) > 0)
