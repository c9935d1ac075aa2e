"""Makes configs that were written for GPUs run on the CPU: gloo, batch norm and bfloat16."""

import datetime

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.logging import print_log

from grootvl_mm.engine.optimizers import CPUAmpOptimWrapper


def adapt_to_cpu(cfg: Config) -> None:
    """Change, in place, the settings of a run config that only work on a GPU, and say which.

    - ``AmpOptimWrapper`` becomes :class:`CPUAmpOptimWrapper`;
    - in a distributed run, the processes are joined with gloo, and ``SyncBN``, which PyTorch has
      for GPUs only, becomes ``BN`` (mmengine does so itself in a single process).

    Args:
        cfg: A complete config of mmengine's Runner.

    Raises:
        ValueError: The launcher cannot start processes on the CPU.
    """
    wrapper = cfg.get("optim_wrapper") or {}
    if wrapper.get("type") == "AmpOptimWrapper":
        wrapper.type = f"grootvl_mm.{CPUAmpOptimWrapper.__name__}"
        dtype = wrapper.pop("dtype", None)
        wrapper.pop("loss_scale", None)
        instead = f" instead of {dtype}" if dtype not in (None, "bfloat16") else ""
        print_log(f"AMP on the CPU: autocast to bfloat16{instead}, no loss scaling.", "current")
    if cfg.launcher == "none":
        return
    if cfg.launcher != "pytorch":
        raise ValueError(
            f"--launcher {cfg.launcher} needs GPUs and none was found; on the CPU use torchrun "
            "with --launcher pytorch, as tools/dist_train.sh and tools/dist_test.sh do"
        )
    _join_with_gloo(cfg)
    replaced = _replace_sync_bn(cfg.model)
    if replaced:
        print_log(f"{replaced} x SyncBN in the config became BN: the CPU has no SyncBN.", "current")


def _join_with_gloo(cfg: Config) -> None:
    """Start the process group here, because mmengine selects a CUDA device while it does so."""
    env_cfg = cfg.get("env_cfg", {})
    dist_cfg = {**env_cfg.get("dist_cfg", {}), "backend": "gloo"}
    cfg.env_cfg = {**env_cfg, "dist_cfg": dist_cfg}
    if not is_distributed():
        seconds = dist_cfg.get("timeout")
        torch.distributed.init_process_group("gloo", timeout=seconds and datetime.timedelta(seconds=seconds))
    wrapper = cfg.get("model_wrapper_cfg") or {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
    }
    # DistributedDataParallel takes no device ids on the CPU, but mmengine gives it some.
    cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}


def _replace_sync_bn(node: object) -> int:
    """Turn every ``dict(type='SyncBN')`` below ``node`` into BN; return how many there were."""
    if isinstance(node, dict):
        here = node.get("type") == "SyncBN"
        if here:
            node["type"] = "BN"
        return here + sum(_replace_sync_bn(child) for child in node.values())
    if isinstance(node, (list, tuple)):
        return sum(_replace_sync_bn(child) for child in node)
    return 0
