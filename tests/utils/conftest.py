"""Fixtures of tests that read checkpoints."""

import pytest

from grootvl_mm.utils import safe_checkpoints


@pytest.fixture(params=[False, True], ids=["default", "backport"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to restrict what is read: PyTorch's, and our own before PyTorch 2.11."""
    if request.param:
        monkeypatch.setattr(safe_checkpoints, "_IS_STRICT", False)
