"""Five cases computed in plain NumPy with the published semantics, apart from this code (tests/ops/data)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree, tree_scan

CASES = np.load(Path(__file__).parent / "data" / "tree_ops.npz")
METRICS = {"Cosine": "cosine", "Norm2": "euclidean"}


@pytest.mark.parametrize("number", range(5))
def test_case(device: torch.device, number: int) -> None:
    case = {key.split("/")[1]: CASES[key] for key in CASES.files if key.startswith(f"case{number}/")}
    feature = torch.from_numpy(case["feature"]).to(device)
    weight = grid_edge_weight(feature, METRICS[str(case["distance"])])
    tree = grid_tree(weight, *feature.shape[2:])
    assert tree.parent.tolist() == case["parent"].tolist()
    assert [{tuple(edge) for edge in image} for image in tree.edges().tolist()] == [
        {tuple(edge) for edge in image} for image in case["edges"].tolist()
    ]

    # The cases are (B, D, L).
    x, decay, grad_h, out, grad_x, grad_decay = (
        torch.from_numpy(case[name]).to(device).transpose(1, 2)
        for name in ("x", "a", "grad_out", "out", "grad_x", "grad_a")
    )
    x.requires_grad_()
    decay.requires_grad_()
    h = tree_scan(x, decay, Tree(*tree))
    h.backward(grad_h)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if x.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(h, out, **tolerance)
    torch.testing.assert_close(x.grad, grad_x, **tolerance)
    torch.testing.assert_close(decay.grad, grad_decay, **tolerance)
