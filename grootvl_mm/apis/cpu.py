"""Adapts configs written for GPUs to the CPU: gloo, batch norm and bfloat16."""

import datetime

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.logging import print_log

from grootvl_mm.engine.optimizers import CPUAmpOptimWrapper


def adapt_to_cpu(cfg: Config) -> None:
    """Replace, in place, the GPU-only settings of a run config, and log each change.

    - ``AmpOptimWrapper`` becomes :class:`CPUAmpOptimWrapper`;
    - distributed runs use the gloo backend, and ``SyncBN``, which PyTorch has for GPUs only, becomes ``BN`` (in a
      single process mmengine does this itself).

    Args:
        cfg: A complete config for mmengine's Runner.

    Raises:
        ValueError: The launcher does not support the CPU.
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
            f"--launcher {cfg.launcher} needs GPUs, but none was found; on the CPU, use torchrun with --launcher "
            "pytorch, as tools/dist_train.sh and tools/dist_test.sh do"
        )
    _join_with_gloo(cfg)
    replaced = _replace_sync_bn(cfg.model)
    if replaced:
        print_log(f"Replaced {replaced} x SyncBN in the config by BN: SyncBN does not run on the CPU.", "current")


def _join_with_gloo(cfg: Config) -> None:
    """Initialize the process group here: mmengine's own code for it selects a CUDA device."""
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
    # DistributedDataParallel accepts no device_ids on the CPU, but mmengine passes some by default.
    cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}


def _replace_sync_bn(node: object) -> int:
    """Turn every ``dict(type='SyncBN')`` below ``node`` into BN and return their number."""
    if isinstance(node, dict):
        here = node.get("type") == "SyncBN"
        if here:
            node["type"] = "BN"
        return here + sum(_replace_sync_bn(child) for child in node.values())
    if isinstance(node, (list, tuple)):
        return sum(_replace_sync_bn(child) for child in node)
    return 0
