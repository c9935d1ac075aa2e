"""Fixtures of all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is: one test body serves them all."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _fresh_memory_is_garbage() -> Iterator[None]:
    """With emulated CUDA kernels (ops/cuda_emulation) new tensors are NaN, so that a result never written shows."""
    torch.use_deterministic_algorithms("GROOTVL_EMULATION_SEED" in os.environ)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _convolutions_are_exact() -> None:
    """By default, cuDNN rounds what a float32 convolution multiplies to 10 bits (TF32), and may add in any order."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
