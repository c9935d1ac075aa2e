"""Lets mmengine read checkpoints by :func:`~grootvl_mm.utils.safe_checkpoints.read_checkpoint`.

mmengine's own readers differ in what they promise: files on the disk go through ``torch.load``, which does not look at
check sums; downloads are read with ``weights_only=False``, which runs code of the file; and onedl-mmengine reads any
file that is refused a second time with ``weights_only=False``. Where the readers here are in use, no file is read in
another way, from wherever it comes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from mmengine import dist

from grootvl_mm.utils.loaded_weights import check_weights
from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely, read_checkpoint


def keep_stand_ins() -> None:
    """Keep onedl-mmengine from putting NumPy's own types beside our stand-ins while it reads a file.

    Which of two types of one name torch then takes is left to chance; a mixture reads nothing.
    """
    try:
        distribution("onedl-mmengine")
        from mmengine.runner import checkpoint as host
    except (PackageNotFoundError, ImportError):  # without OpenCV, there is no Runner that could read anything
        return
    if torch.__version__ >= "2.6" and hasattr(host, "get_torch_safe_globals"):
        host.get_torch_safe_globals = lambda: [slice]


def use_safe_loaders() -> None:
    """Replace mmengine's readers of checkpoints in this process. Before torch 2.6, nothing can be done."""
    # Importing the Runner takes OpenCV, which the models do without.
    from mmengine.runner import checkpoint as host

    if torch.__version__ < "2.6":
        return
    register = host.CheckpointLoader.register_scheme
    register("", loader=load_from_local, force=True)
    register(("http://", "https://"), loader=load_from_http, force=True)
    # Names of model zoos become addresses, which mmengine hands to the function of this name ...
    host.load_from_http = load_from_http
    # ... and onedl-mmengine hands what it got from storage services to this one.
    if hasattr(host, "_safe_torch_load"):
        host._safe_torch_load = _load


@contextmanager
def safe_loaders() -> Iterator[None]:
    """Replace mmengine's readers of checkpoints for some lines."""
    from mmengine.runner import checkpoint as host

    names = ("load_from_http", "_safe_torch_load")
    schemes, functions = (
        host.CheckpointLoader._schemes,
        {name: vars(host)[name] for name in names if name in vars(host)},
    )
    host.CheckpointLoader._schemes = schemes.copy()
    try:
        use_safe_loaders()
        yield
    finally:
        host.CheckpointLoader._schemes = schemes
        vars(host).update(functions)


def load_from_local(filename: str, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a file, as mmengine's function of this name.

    Raises:
        CheckpointError: as :func:`read_checkpoint`.
    """
    return _read(Path(filename).expanduser(), map_location)


def load_from_http(
    filename: str, map_location: Any = "cpu", model_dir: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Download a file, once for each machine, and read it, as mmengine's function of this name.

    Raises:
        CheckpointError: it cannot be downloaded, or as :func:`read_checkpoint`.
    """
    rank, world_size = dist.get_dist_info()
    folder = Path(model_dir or Path(torch.hub.get_dir(), "checkpoints"))
    target = folder / Path(unquote(urlparse(filename).path)).name
    rank = dist.get_local_rank() if world_size > 1 else rank
    if rank == 0 and not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        digest = torch.hub.HASH_REGEX.search(target.name)
        try:
            torch.hub.download_url_to_file(filename, str(target), digest and digest[1], progress)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot download {filename}: {str(error).splitlines()[0]}") from error
    if world_size > 1:
        dist.barrier()
    return _read(target, map_location)


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    content = read_checkpoint(path, map_location=map_location)
    try:
        check_weights(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return content


def _load(file: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
    """Stand in for onedl-mmengine's ``_safe_torch_load``; ``weights_only`` is always True."""
    return load_safely(file, map_location=map_location)
