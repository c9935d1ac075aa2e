"""Makes mmengine read checkpoints with :func:`~grootvl_mm.utils.safe_checkpoints.read_checkpoint`.

mmengine's own loaders offer different guarantees: local files go through ``torch.load``, which does not verify
checksums; downloads are loaded with ``weights_only=False``, which runs code from the file; and onedl-mmengine retries a
refused file with ``weights_only=False``. The loaders here replace all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch
from mmengine import dist

from grootvl_mm.utils.loaded_weights import check_weights
from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely, read_checkpoint


def use_safe_loaders() -> None:
    """Replace mmengine's checkpoint loaders in this process."""
    # Imported here: the Runner requires OpenCV, which the models do not need.
    from mmengine.runner import checkpoint as host

    register = host.CheckpointLoader.register_scheme
    register("", loader=load_from_local, force=True)
    register(("http://", "https://"), loader=load_from_http, force=True)
    # mmengine resolves model zoo names to URLs and calls this function by name,
    host.load_from_http = load_from_http
    # and onedl-mmengine calls this one for files from storage services.
    if hasattr(host, "_safe_torch_load"):
        host._safe_torch_load = _load


@contextmanager
def safe_loaders() -> Iterator[None]:
    """Replace mmengine's checkpoint loaders within the block."""
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
    """Read a local file; replaces mmengine's function of this name.

    Raises:
        CheckpointError: See :func:`read_checkpoint`.
    """
    return _read(Path(filename).expanduser(), map_location)


def load_from_http(
    filename: str, map_location: Any = "cpu", model_dir: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Download a file once per machine and read it; replaces mmengine's function of this name.

    Raises:
        CheckpointError: The file cannot be downloaded, or see :func:`read_checkpoint`.
    """
    rank, world_size = dist.get_dist_info()
    folder = Path(model_dir or Path(torch.hub.get_dir(), "checkpoints"))
    name = Path(unquote(urlparse(filename).path)).name
    if name in ("", ".."):
        raise CheckpointError(f"{filename} names no file; expected the address of a checkpoint")
    target = folder / name
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
