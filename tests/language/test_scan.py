"""The scans of a mixer against an implementation that does one token after the other."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import grootvl_mm.language.scan
from grootvl_mm.language import GrootLConfig, GrootLMixer
from grootvl_mm.language.prompts import locate_prompts
from grootvl_mm.language.scan import PromptTree, selective_scan
from grootvl_mm.ops import Tree
from tests.helpers.token_trees import Tokens, causal_states, chain_states, random_tokens, tree_states


def mixer(tokens: Tokens, **config: object) -> GrootLMixer:
    """One whose state matrix is that of the tokens."""
    channels, size = tokens.a.shape
    config = GrootLConfig(hidden_size=channels, expand=1, state_size=size, num_hidden_layers=1, **config)
    result = GrootLMixer(config, layer_idx=0).double()
    result.A_log.data = tokens.a.neg().log()
    return result


def scan_prompts(samples: Sequence[Tokens], prompts: Sequence[int], **config: object) -> Tensor:
    """The output of the scan for samples of equal length."""
    u, delta, b, c = (torch.stack([getattr(sample, name) for sample in samples]) for name in ("u", "delta", "b", "c"))
    samples = [sample._replace(a=samples[0].a) for sample in samples]
    located = locate_prompts(prompts, u)
    with torch.no_grad():
        return mixer(samples[0], **config).scan_prompt_tree(u, delta, b, c, None, located if located.end else None)[0]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    length=st.integers(1, 14),
    prompts=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    reach=st.integers(1, 4),
    scale=st.sampled_from([0.3, -1.0]),
    edge_decay=st.sampled_from(["next", "own"]),
)
def test_prompt_trees(seed: int, length: int, prompts: list[int], reach: int, scale: float, edge_decay: str) -> None:
    torch.manual_seed(seed)
    samples = [random_tokens(length) for _ in prompts]
    samples = [sample._replace(a=samples[0].a) for sample in samples]
    prompts = [min(prompt, length) for prompt in prompts]
    found = scan_prompts(samples, prompts, tree_reach=reach, tree_scale=scale, edge_decay=edge_decay)
    for sample, prompt, output in zip(samples, prompts, found, strict=True):
        states = chain_states(sample) + scale * tree_states(sample, prompt, reach, edge_decay)
        torch.testing.assert_close(output, sample.readout(states))


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_without_a_choice_the_tree_is_the_chain(prompt: int) -> None:
    sample = random_tokens(7)
    (output,) = scan_prompts([sample], [prompt])
    torch.testing.assert_close(output, 1.3 * sample.readout(chain_states(sample)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), length=st.integers(1, 14), reach=st.integers(1, 4), first=st.integers(0, 14))
def test_causal_trees(seed: int, length: int, reach: int, first: int) -> None:
    """In one call and in two."""
    torch.manual_seed(seed)
    sample = random_tokens(length)
    expected = sample.readout(causal_states(sample, reach))
    module = mixer(sample, tree="causal", tree_reach=reach)
    inputs = [value.unsqueeze(0) for value in (sample.u, sample.delta, sample.b, sample.c)]
    cache = DynamicCache(config=module.config)
    cache.layers[0].has_previous_state[0] = True  # as the convolution leaves it
    with torch.no_grad():
        output, tree = module.scan_causal_tree(*inputs, None, None)
        parts = [
            module.scan_causal_tree(*(value[:, part] for value in inputs), cache, None)[0]
            for part in (slice(0, first), slice(first, length))
            if len(range(length)[part])
        ]
    torch.testing.assert_close(output[0], expected)
    torch.testing.assert_close(torch.cat(parts, 1)[0], expected)
    assert (tree.parent < tree.order).sum() == length - 1  # parents stand before their children


def test_reach_one_of_causal_trees_is_the_chain() -> None:
    sample = random_tokens(9)
    torch.testing.assert_close(causal_states(sample, 1), chain_states(sample))


def random_scan(length: int = 6) -> tuple[list[Tensor], PromptTree]:
    samples = [random_tokens(length) for _ in range(2)]
    inputs = [torch.stack([getattr(sample, name) for sample in samples]) for name in ("u", "delta")]
    inputs += [samples[0].a, *(torch.stack([getattr(sample, name) for sample in samples]) for name in ("b", "c"))]
    parent = torch.tensor([[1, 3, 1, 3], [2, 0, 3, 3]], dtype=torch.int32)
    order = torch.tensor([[3, 1, 0, 2], [3, 2, 0, 1]], dtype=torch.int32)
    return inputs, PromptTree(Tree(parent, order), 0.3, "next")


@pytest.mark.parametrize("edge_decay", ["next", "own"])
def test_gradients(edge_decay: str) -> None:
    inputs, recurrence = random_scan()
    recurrence = recurrence._replace(edge_decay=edge_decay)
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(lambda *values: selective_scan(*values, recurrence), inputs)


def test_channels_are_scanned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, recurrence = random_scan()
    state = torch.randn(2, 1, 5, 3, dtype=torch.float64)
    chain = recurrence._replace(tree=None)

    def results() -> list[Tensor]:
        values = [value.clone().requires_grad_() for value in (*inputs, state)]
        outputs = [*selective_scan(*values[:5], recurrence), *selective_scan(*values[:5], chain, values[5])]
        weights = [torch.linspace(-1, 1, output.numel(), dtype=output.dtype) for output in outputs]
        loss = sum(output.flatten() @ weight for output, weight in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, values)]

    whole = results()
    monkeypatch.setitem(grootvl_mm.language.scan._NUMBERS_AT_ONCE, "cpu", 2 * 2 * 6 * 3)  # two channels
    for expected, result in zip(whole, results(), strict=True):
        torch.testing.assert_close(result, expected)


def test_no_result_keeps_the_states() -> None:
    inputs, recurrence = random_scan()
    for result in selective_scan(*inputs, recurrence):
        assert result.untyped_storage().nbytes() == result.nbytes


def test_training_keeps_nothing_of_the_size_of_the_states() -> None:
    inputs, recurrence = random_scan()
    inputs[0].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()), lambda _: None):
        selective_scan(*inputs, recurrence)
    assert max(kept) < 2 * 6 * 5 * 3
