"""Backports for older versions of PyTorch; the newest runs them too."""

import subprocess
import sys

from torch.autograd.graph import saved_tensors_hooks

from grootvl_mm.ops._compat import top_saved_tensors_hooks

CODE = """
import mmengine.runner  # and what it takes from torch
import torch
for name in ("register_fake", "register_autograd"):
    vars(torch.library).pop(name, None)
from grootvl_mm.ops import _compat
from grootvl_mm.ops import grid_edge_weight, grid_tree, tree_scan
assert _compat.register_fake.__module__ == _compat.__name__

feature = torch.randn(1, 3, 4, 4, requires_grad=True)
weight = grid_edge_weight(feature)
assert not weight.requires_grad
tree = grid_tree(weight, 4, 4)
x, decay = (torch.rand(1, 16, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
scan = lambda x, decay: tree_scan(x, decay, tree)
assert torch.autograd.gradcheck(scan, (x, decay))
assert torch.autograd.gradgradcheck(scan, (x, decay))

with torch.autocast("cpu", dtype=torch.bfloat16):
    narrow = tree_scan(x.bfloat16(), decay.float(), tree)
assert narrow.dtype == torch.float32
narrow.sum().backward()
assert x.grad is not None

shapeless = torch.ops.grootvl.tree_scan(*(value.to("meta") for value in (x, decay, *tree)), "all")
assert shapeless.shape == x.shape and shapeless.dtype == x.dtype
"""


def test_operators_without_the_newer_registrations():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_innermost_saved_tensor_hooks():
    """Before PyTorch 2.7, they are found in C++: references must be kept and released."""
    pack, other, unpack = (lambda value: value for _ in range(3))
    assert top_saved_tensors_hooks() is None
    with saved_tensors_hooks(pack, unpack):
        references = [sys.getrefcount(hook) for hook in (pack, unpack)]
        with saved_tensors_hooks(other, unpack):
            assert top_saved_tensors_hooks() == (other, unpack)
        for _ in range(10):
            assert top_saved_tensors_hooks() == (pack, unpack)
        assert [sys.getrefcount(hook) for hook in (pack, unpack)] == references
    assert top_saved_tensors_hooks() is None
