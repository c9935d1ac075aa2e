"""Marks that tests of several folders share."""

import pytest
import torch

needs_compiler = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch.compile and torch.export of models, and opcheck, need torch 2.6"
)

needs_free_batches = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="PyTorch 2.6 exports no padded batches of a free size"
)

needs_float16_on_the_cpu = pytest.mark.skipif(
    torch.__version__ < "2.3", reason="autocast to float16 on the CPU needs torch 2.3"
)
HALVES = (torch.bfloat16, pytest.param(torch.float16, marks=needs_float16_on_the_cpu))  # for autocast on any device

needs_safe_globals = pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch.load is not safe by default, and cannot be told what else to allow"
)

needs_symbolic_convolutions = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="PyTorch 2.11 cannot trace second derivatives of a convolution with free shapes"
)
