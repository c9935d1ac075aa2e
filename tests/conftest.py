"""Fixtures of all tests."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every available device, so that one test body serves them all."""
    return torch.device(request.param)


@pytest.fixture
def sync_debug_mode() -> Iterator[None]:
    """Reset ``torch.cuda.set_sync_debug_mode`` after a test that changes it."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _collections_are_short() -> None:
    """Hosts collect garbage with every data set; the million objects of their modules need not be looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _fresh_memory_is_garbage() -> Iterator[None]:
    """With emulated CUDA kernels (tests/cuda_emulation), new tensors are NaN, so that results never written show."""
    torch.use_deterministic_algorithms("GROOTVL_EMULATION_SEED" in os.environ)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _convolutions_are_exact() -> None:
    """By default, cuDNN rounds the factors of float32 convolutions to 10 bits (TF32) and may sum in any order."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
