"""Old import path of :mod:`grootvl_mm.apis.cli`."""

from grootvl_mm.apis.cli import (
    add_config_arguments,
    add_runner_arguments,
    check_file,
    checkpoint_errors,
    close_process_group,
    fail,
    finish_runner_config,
    load_config,
    prepare_runner_config,
)

__all__ = [
    "add_config_arguments",
    "add_runner_arguments",
    "check_file",
    "checkpoint_errors",
    "close_process_group",
    "fail",
    "finish_runner_config",
    "load_config",
    "prepare_runner_config",
]
