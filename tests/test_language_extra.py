"""The package without the packages of Hugging Face."""

import importlib
import sys

import pytest


def import_without(missing: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package were not installed and a module of ours had not been imported."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.import_module(module)


def test_language_models_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"needs transformers.* pip install 'grootvl_mm\[language\]'"):
        import_without("transformers", "grootvl_mm.language", monkeypatch)


def test_lora_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ImportError, match=r"needs peft.* pip install 'grootvl_mm\[language\]'"):
        import_without("peft", "grootvl_mm.language.lora", monkeypatch)
