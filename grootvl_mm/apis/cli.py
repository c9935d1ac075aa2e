"""Shared code of ``tools/train.py``, ``tools/test.py`` and the tools that load a model."""

import argparse
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.runner import load_checkpoint
from torch import nn

from grootvl_mm.apis.cfg_options import CfgOptions
from grootvl_mm.apis.checkpoint_files import CheckpointError, read_checkpoint
from grootvl_mm.apis.cpu import adapt_to_cpu
from grootvl_mm.apis.whole_files import whole_file
from grootvl_mm.engine.hooks import (
    CompleteCheckpointHook,
    GlobalLossHook,
    RanksAgreeHook,
    RanksDifferError,
    ResumedValidationHook,
    UntrustedCheckpointHook,
)
from grootvl_mm.utils.host_loaders import use_safe_loaders
from grootvl_mm.utils.loaded_weights import all_weights_loaded
from grootvl_mm.utils.processes import end_children_with_this_process, end_with_parent

# default_scope of the config -> names of its package on PyPI: OpenMMLab's, and that of the onedl stack
HOSTS = {
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}

# Disk full, quota exceeded, read-only, no permission, file too large.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
# How torch's errors start if a state dict belongs to another model, averaged model or optimizer.
MISFITS = ("Error(s) in loading state_dict", "loaded state dict", "DDP expects same model across all ranks")
# Timeout of collective operations unless the config sets one; PyTorch's default for gloo is 30 minutes.
DIST_TIMEOUT = 600  # seconds
MAX_REASON = 300  # characters of another library's error
# Found in errors of gloo, NCCL and PyTorch's store if another rank is lost.
LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "timed out")


def fail(message: str) -> NoReturn:
    """Exit with status 1 and a one-line error on stderr."""
    raise SystemExit(f"error: {message}")


def one_line(error: Exception) -> str:
    """The message of an error on one line, cut to :data:`MAX_REASON` characters; its type if there is no message."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def add_config_arguments(parser: argparse.ArgumentParser, config_help: str = "path of the config file") -> None:
    """Add ``config`` and ``--cfg-options``."""
    parser.add_argument("config", help=config_help)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=CfgOptions,
        metavar="KEY=VALUE",
        help='override config settings, e.g. train_cfg.max_iters=100 load_from="my work/a.pth"; write lists as key=a,b '
        'or key="[a, b]"',
    )


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--work-dir`` and ``--launcher``, named as in the training and test scripts of OpenMMLab."""
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: work_dirs/CONFIG_NAME)")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="job launcher that started the processes of a distributed run (default: %(default)s, a single process)",
    )
    # Launchers pass either spelling, depending on their version; the value itself is read from LOCAL_RANK.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def check_file(path: str, what: str, hint: str) -> None:
    """Exit with an error if ``path`` is neither a file nor a URL."""
    if "://" not in path and not os.path.isfile(path):
        fail(f"{what} {path!r} does not exist or is not a file; {hint}")


@contextmanager
def checkpoint_errors(path: str | None = None) -> Iterator[None]:
    """Turn errors about checkpoints that are unreadable or do not match the model into one-line errors.

    Args:
        path: The checkpoint of the whole model, if there is one. It is read again only after an error.
    """
    try:
        yield
    except RanksDifferError as error:
        fail(str(error))
    except CheckpointError as error:
        fail(f"{path}: {error}" if path and str(path) not in str(error) else str(error))
    except OSError as error:
        if error.errno in DISK_ERRORS:
            fail(f"{error.filename or 'cannot write a file'}: {error.strerror}")
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if text.startswith(MISFITS):
            fail(f"the checkpoint does not fit the config's model or optimizer: {one_line(error)}")
        if is_distributed() and any(sign in text for sign in LOST):
            fail(f"lost another rank, or the connection to it: {one_line(error)}")
        if path is not None and Path(path).is_file():
            try:
                read_checkpoint(path)
            except CheckpointError as unreadable:
                fail(str(unreadable))
        raise


def load_weights(model: nn.Module, checkpoint: str, hint: str = "give the path of a .pth file") -> None:
    """Load a checkpoint into a model, or exit with a one-line error; every weight must be in the checkpoint.

    Args:
        model: Modified in place.
        checkpoint: Path or URL of the file.
        hint: What to do if the file does not exist.
    """
    check_file(checkpoint, "checkpoint", hint)
    with checkpoint_errors(checkpoint), all_weights_loaded(model):
        load_checkpoint(model, checkpoint, map_location="cpu", logger="silent")


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Turn errors of writing a file into one-line errors.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")


@contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to, see :func:`whole_file`; exit with a one-line error if writing fails.

    Args:
        path: The file; its folder is created.
    """
    path = Path(path)
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial


@contextmanager
def language_errors() -> Iterator[None]:
    """Turn errors about missing packages, recipes, data and models of the language tools into one-line errors."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if not isinstance(error, ImportError) and type(error).__module__.partition(".")[0] != "grootvl_mm":
            raise
        fail(str(error))
    except OSError as error:
        if error.errno in DISK_ERRORS:
            fail(f"{error.filename or 'cannot write a file'}: {error.strerror}")
        if error.errno is None:  # transformers has not found the model
            fail(one_line(error))
        raise


def read_config(path: str, cfg_options: dict | None = None) -> Config:
    """Read any config and merge the command line's overrides.

    Args:
        path: Path of the config file.
        cfg_options: Overrides, dotted key to value.
    """
    check_file(path, "config", "give the path of a config file, e.g. one in configs/")
    cfg = Config.fromfile(path)
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    return cfg


def load_config(path: str, cfg_options: dict | None = None) -> Config:
    """Load a detection, segmentation or classification config and merge the command line's overrides.

    It also switches this process to safe checkpoint loading (:mod:`grootvl_mm.utils.host_loaders`).

    Args:
        path: Path of the config file.
        cfg_options: Overrides, dotted key to value.

    Returns:
        The config; its ``default_scope`` is a key of :data:`HOSTS` whose package is installed.
    """
    use_safe_loaders()
    cfg = read_config(path, cfg_options)
    scope = cfg.get("default_scope")
    if scope not in HOSTS:
        came = "no default_scope" if scope is None else f"default_scope={scope!r}"
        if "trainer" in cfg:
            fail(f"{path} is a language model recipe; run it with tools/language/finetune.py")
        fail(
            f"{path} has {came}; expected one of {', '.join(map(repr, HOSTS))}, for detection, segmentation or "
            "classification"
        )
    if find_spec(scope) is None:
        name, onedl_name = HOSTS[scope]
        fail(
            f"{path} needs {scope} (its default_scope), which is not installed; run: mim install {name} "
            f"(onedl stack: mim install {onedl_name})"
        )
    return cfg


def prepare_runner_config(args: argparse.Namespace) -> Config:
    """Load the config of a run and apply the options of :func:`add_runner_arguments`."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    if cfg.default_scope == "mmpretrain":
        _set_classification_loaders(cfg)
    return cfg


def finish_runner_config(cfg: Config, allow_mismatch: bool = False) -> None:
    """Adapt a complete run config to device and launcher and add the safety hooks; call it right before ``Runner``.

    It also makes the data loader workers exit with this process, and this process exit with torchrun.

    Args:
        cfg: Modified in place.
        allow_mismatch: Only warn if the tested checkpoint lacks some of the model's weights.
    """
    end_children_with_this_process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
    hooks = [
        {"type": f"grootvl_mm.{UntrustedCheckpointHook.__name__}"},
        {"type": f"grootvl_mm.{CompleteCheckpointHook.__name__}", "allow_mismatch": allow_mismatch},
    ]
    if cfg.get("resume"):
        hooks.append({"type": f"grootvl_mm.{ResumedValidationHook.__name__}"})
    if cfg.launcher != "none":
        hooks += [{"type": f"grootvl_mm.{hook.__name__}"} for hook in (GlobalLossHook, RanksAgreeHook)]
        _limit_waiting(cfg)
    cfg.custom_hooks = [*hooks, *(cfg.get("custom_hooks") or [])]
    if get_device() == "cpu":
        try:
            adapt_to_cpu(cfg)
        except ValueError as error:
            fail(str(error))


def _limit_waiting(cfg: Config) -> None:
    """Set a timeout, so that ranks do not wait half an hour for one that is gone or unreachable."""
    env_cfg = cfg.get("env_cfg") or {}
    cfg.env_cfg = {**env_cfg, "dist_cfg": {"timeout": DIST_TIMEOUT, **(env_cfg.get("dist_cfg") or {})}}


def close_process_group() -> None:
    """Destroy the process group, if there is one; torch warns otherwise."""
    if is_distributed():
        torch.distributed.destroy_process_group()


def _set_classification_loaders(cfg: Config) -> None:
    """Apply the data loader defaults of mmpretrain's ``tools/train.py``."""
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = cfg.get(name)
        if loader is not None:
            loader.setdefault("collate_fn", {"type": "default_collate"})
            loader.setdefault("pin_memory", torch.cuda.is_available())
            loader.setdefault("persistent_workers", loader.get("num_workers", 0) > 0)
