"""What ``tools/train.py``, ``tools/test.py`` and the tools that load a model have in common."""

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

# default_scope of the config -> pip names of the package that serves the task: OpenMMLab's and that of the onedl stack
HOSTS = {
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
    "mmpretrain": ("mmpretrain", "onedl-mmpretrain"),
}

# What a disk says that is full or must not be written to, or whose user has no more room.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
# How torch begins what it says about state dicts of other models, averaged models and optimizers.
MISFITS = ("Error(s) in loading state_dict", "loaded state dict", "DDP expects same model across all ranks")
# How long a process waits for another, if the config does not say; PyTorch's own default is 30 minutes over TCP.
DIST_TIMEOUT = 600  # seconds
MAX_REASON = 300
# What is in errors of gloo, NCCL and PyTorch's store when another process has gone.
LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "timed out")


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
            fail(f"the checkpoint does not fit the config's model or optimizer: {text[:MAX_REASON]}")
        if is_distributed() and any(sign in text for sign in LOST):
            fail(f"lost another process, or the link to it: {text[:MAX_REASON]}")
        if path is not None and Path(path).is_file():
            try:
                read_checkpoint(path)
            except CheckpointError as unreadable:
                fail(str(unreadable))
        raise


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint into a model, or fail with one clear line; what it leaves random is a failure.

    Args:
        model: Loaded in place.
        checkpoint: Path or address of the file.
    """
    with checkpoint_errors(checkpoint), all_weights_loaded(model):
        load_checkpoint(model, checkpoint, map_location="cpu", logger="silent")


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """Fail with one clear line where a file cannot be written.

    Args:
        path: What is written.
    """
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror or error}")


@contextmanager
def language_errors() -> Iterator[None]:
    """Fail with one clear line where packages for language models are missing, or recipe, data or model are wrong."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if not isinstance(error, ImportError) and type(error).__module__.partition(".")[0] != "grootvl_mm":
            raise
        fail(str(error))
    except OSError as error:
        if error.errno in DISK_ERRORS:
            fail(f"{error.filename or 'cannot write a file'}: {error.strerror}")
        if error.errno is None:  # how transformers says that it finds no model
            fail(" ".join(str(error).split()))
        raise


def read_config(path: str, cfg_options: dict | None = None) -> Config:
    """Read a config of any kind and merge the overrides of the command line.

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
    """Load a config of one of the three tasks and merge the overrides of the command line.

    From here on, this process reads checkpoints safely (:mod:`grootvl_mm.utils.host_loaders`).

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
            fail(f"{path} is a recipe for a language model; run tools/language/finetune.py with it")
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


def finish_runner_config(cfg: Config, allow_mismatch: bool = False) -> None:
    """Fit a complete run config to the device and the launcher, and make it safe; call it right before ``Runner``.

    Its data workers end with this process, and this process with torchrun.

    Args:
        cfg: Changed in place.
        allow_mismatch: Test a model even if its checkpoint lacks some of its weights.
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
    """Let processes that wait for one that is gone, or behind a cut link, give up in time."""
    env_cfg = cfg.get("env_cfg") or {}
    cfg.env_cfg = {**env_cfg, "dist_cfg": {"timeout": DIST_TIMEOUT, **(env_cfg.get("dist_cfg") or {})}}


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
