"""Marks that tests of several folders share."""

import pytest
import torch

needs_compiler = pytest.mark.skipif(
    not hasattr(torch.library, "register_autograd"),
    reason="opcheck, torch.compile and torch.export of the operators need torch 2.4",
)

needs_float16_on_the_cpu = pytest.mark.skipif(
    torch.__version__ < "2.4", reason="autocast to float16 on the CPU came after torch 2.1"
)

needs_safe_globals = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="safe loading is not the default, and cannot be told what else to allow"
)

needs_symbolic_convolutions = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="PyTorch 2.11 cannot trace second derivatives of a convolution with free shapes"
)
