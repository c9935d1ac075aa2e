"""Adapters: all of them are trained, none is bypassed, and merging keeps the logits."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mamba import modeling_mamba

from grootvl_mm.language import GrootLForCausalLM
from grootvl_mm.language.lora import TARGETS, add_lora, lora_config, merge_lora
from tests.helpers.small_language_models import VARIANTS, pad, random_texts, small_model
from tests.helpers.tool_runs import ROOT

KERNELS = (
    *("mamba_inner_fn", "mamba_selective_scan", "mamba_selective_state_update"),
    *("causal_conv1d_fn", "causal_conv1d_update"),
)


def adapted_model(targets: str | list[str] = "default", **config: object) -> PeftModel:
    """A model whose adapters change something."""
    model = add_lora(small_model(**config), targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def batch() -> dict[str, Tensor]:
    """The same at each call."""
    torch.manual_seed(0)
    ids, mask, _ = pad(random_texts(12, 9), "left")
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :12] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def useless_adapters(model: PeftModel) -> list[str]:
    """Adapters without a gradient."""
    model.train()
    model(**batch()).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    return [name for name, value in trained.items() if value.grad is None or not value.grad.abs().max() > 0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [*TARGETS, ["dt_proj"]], ids=str)
def test_each_adapter_has_a_gradient(targets: str | list[str], variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in KERNELS:  # which would read the weights below the adapters
        monkeypatch.setattr(modeling_mamba, kernel, None)
    model = adapted_model(targets, **VARIANTS[variant])
    names = TARGETS.get(targets, targets) if isinstance(targets, str) else targets
    assert {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_" in name} == set(
        names
    )
    assert useless_adapters(model) == []


def test_adapters_of_the_convolution_have_a_gradient() -> None:
    model = small_model()
    channels = model.config.intermediate_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that merging is not supported
        model = add_lora(model, ["conv1d"], r=channels, init_lora_weights=False)
    assert useless_adapters(model) == []


def test_installed_kernels_are_not_used(tmp_path: Path) -> None:
    """With stand-ins for the packages of the fused kernels, which must not be called."""
    names = {"mamba_ssm": KERNELS[:3], "causal_conv1d": KERNELS[3:]}
    for package, functions in names.items():
        functions = (*functions, "selective_scan_fn", "selective_state_update")
        text = "".join(
            f"def {name}(*args, **kwargs):\n    raise AssertionError('{name} is called')\n" for name in functions
        )
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)
    code = f"""
import json, sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
import torch
from transformers import MambaConfig, MambaForCausalLM
from tests.language.test_lora import adapted_model, useless_adapters
from tests.helpers.small_language_models import SIZES
try:
    MambaForCausalLM(MambaConfig(**SIZES)).train()(torch.zeros((1, 4), dtype=torch.int64))
    called = ""
except AssertionError as error:
    called = str(error)
print(json.dumps([called, useless_adapters(adapted_model("published"))]))
"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True)
    called, useless = json.loads(output.splitlines()[-1])
    assert called == "mamba_inner_fn is called"  # by Mamba of transformers: the packages are taken for installed
    assert useless == []


@pytest.mark.parametrize("targets", [*TARGETS, ["lm_head"], ["embeddings", "lm_head"]], ids=str)
def test_merging_keeps_the_logits(targets: str | list[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of peft, about weights that are shared
        model = adapted_model(targets).eval()
        tested = batch() | {"prompt_lengths": torch.tensor([8, 5])}
        expected = model(**tested).logits
        assert not torch.allclose(expected, small_model()(**tested).logits, atol=1e-2)
        merged = merge_lora(model)
    assert type(merged) is GrootLForCausalLM
    assert not any("lora" in name for name, _ in merged.named_parameters())
    merged.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for result in (merged, loaded.eval()):
        is_tied = targets == "default"
        assert result.config.tie_word_embeddings == is_tied
        assert (result.lm_head.weight is result.backbone.embeddings.weight) == is_tied
        torch.testing.assert_close(result(**tested).logits, expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    model = adapted_model("published").eval()
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model(), tmp_path).eval()
    torch.testing.assert_close(loaded(**batch()).logits, expected)
    torch.testing.assert_close(merge_lora(loaded)(**batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_adapted_models_generate() -> None:
    model = adapted_model().eval()
    ids = torch.stack(random_texts(9, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=ids, **options)
    assert found.tolist() == merge_lora(model).generate(ids, **options).tolist()


def test_recipe_is_published() -> None:
    config = lora_config("published")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    assert lora_config(["x_proj"], r=4).target_modules == {"x_proj"}


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="one of default, published, or a list of module names, got 'all'"):
        lora_config("all")
    with pytest.raises(TypeError, match=r"must be a peft\.PeftModel, got GrootLForCausalLM"):
        merge_lora(small_model())
