"""GrootLForCausalLM: values, causality, padding, training, and what it shares with Mamba of transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from grootvl_mm.language import GrootLConfig, GrootLForCausalLM, GrootLModel
from grootvl_mm.language.prompts import prompt_lengths_of_labels
from tests.helpers.small_language_models import SIZES, VARIANTS, pad, random_texts, randomize, small_model

CASES = torch.load(Path(__file__).parent / "data" / "grootl_micro.pt", weights_only=True)
REFERENCES = {"logits": {}, "plain": {"tree_scale": 0.0}, "chain": {"tree_reach": 1}}
variants = pytest.mark.parametrize("variant", VARIANTS)


def reference_model(kind: str) -> GrootLForCausalLM:
    model = GrootLForCausalLM(GrootLConfig(**CASES["config"], **REFERENCES[kind]))
    missing, unexpected = model.load_state_dict(CASES["state_dict"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # which are the embeddings
    return model.eval()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Relative to the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("how", ["alone", "left", "right", "both", "steps", "chunks"])
@torch.no_grad()
def test_published_values(kind: str, how: str) -> None:
    model = reference_model(kind)
    samples = CASES["samples"]
    prompts = [sample["prompt"] for sample in samples]
    if how in ("left", "right", "both"):
        ids, mask, places = pad([sample["ids"] for sample in samples], how, fill=7)
        logits = model(ids, attention_mask=mask, prompt_lengths=torch.tensor(prompts)).logits
        found = [row[place] for row, place in zip(logits, places, strict=True)]
    else:
        found = []
        for sample, prompt in zip(samples, prompts, strict=True):
            ids = sample["ids"].unsqueeze(0)
            sizes = {"alone": [ids.shape[1]], "steps": [prompt] + [1] * ids.shape[1], "chunks": [prompt, 3, 2, 99]}
            cache, outputs = None, []
            for size in sizes[how]:
                if ids.shape[1]:
                    output = model(
                        ids[:, :size], cache=cache, prompt_lengths=None if cache else [prompt], use_cache=True
                    )
                    cache, ids = output.cache, ids[:, size:]
                    outputs.append(output.logits[0])
            found.append(torch.cat(outputs))
    for sample, logits in zip(samples, found, strict=True):
        assert_close(logits, sample[kind])


def same_weights(**config: object) -> tuple[MambaForCausalLM, GrootLForCausalLM]:
    mamba = randomize(MambaForCausalLM(MambaConfig(**SIZES)))
    model = GrootLForCausalLM(GrootLConfig(**SIZES, **config))
    model.load_state_dict(mamba.state_dict())
    return mamba, model.eval()


@pytest.mark.parametrize("config", [{"tree_scale": 0.0}, {"tree": "causal", "tree_reach": 1}], ids=str)
def test_without_a_tree_it_is_mamba(config: dict) -> None:
    mamba, model = same_weights(**config)
    ids, mask, places = pad(random_texts(11, 8, 15), "left")
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :14] = -100
    losses = []
    for net in (mamba, model):
        output = net(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        losses.append(output)
    for row, place in enumerate(places):
        torch.testing.assert_close(losses[1].logits[row, place], losses[0].logits[row, place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[1].loss, losses[0].loss)
    for (name, expected), parameter in zip(mamba.named_parameters(), model.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad), name


def test_checkpoints_of_mamba_load(tmp_path: Path) -> None:
    mamba, expected = same_weights()
    mamba.save_pretrained(tmp_path)
    model, info = GrootLForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ids = random_texts(9)[0].unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_checkpoints_of_the_first_mamba_load() -> None:
    """Its embeddings have a name without the plural."""
    mamba, model = same_weights()
    weights = {name.replace("embeddings", "embedding"): value for name, value in mamba.state_dict().items()}
    model.load_state_dict(weights)


@variants
def test_saved_models_load_by_auto_classes(variant: str, tmp_path: Path) -> None:
    model = small_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is GrootLForCausalLM
    ids = random_texts(9)[0].unsqueeze(0)
    torch.testing.assert_close(loaded(ids, prompt_lengths=[6]).logits, model(ids, prompt_lengths=[6]).logits)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is GrootLModel
    expected = model.backbone(ids, prompt_lengths=[6]).last_hidden_state
    torch.testing.assert_close(backbone(ids, prompt_lengths=[6]).last_hidden_state, expected)


@torch.no_grad()
def changes(model: GrootLForCausalLM, ids: Tensor, prompt: int) -> Tensor:
    """How far another token at t (rows) moves the logits at each position, (L, L)."""
    length = len(ids)
    others = ids.repeat(length, 1)
    others.fill_diagonal_(0)
    others += torch.eye(length, dtype=torch.int64) * ((ids + 1) % SIZES["vocab_size"])
    logits = model(torch.cat([ids.unsqueeze(0), others]), prompt_lengths=[prompt] * (length + 1)).logits
    return (logits[1:] - logits[:1]).abs().amax(-1)


@variants
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_causality(variant: str, prompt: int) -> None:
    """From the last token of the prompt on, no position depends on later tokens; without a prompt, none does."""
    (ids,) = random_texts(15)
    moved = changes(small_model(**VARIANTS[variant]), ids, prompt)
    later = torch.ones_like(moved, dtype=torch.bool).tril(-1)  # of the position: the token that is changed
    if variant in ("published", "own decay") and prompt == 9:
        assert moved[later][:1].numel()
        assert (moved[:9, :8] * later[:9, :8]).max() > 1e-2  # a prompt sees itself: it must not be scored
        later[:9, :8] = False
    assert moved[later].max() < 1e-4
    assert moved.diagonal().min() > 1e-2


@variants
@torch.no_grad()
def test_samples_do_not_depend_on_others(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    texts, prompts = random_texts(19, 13, 9, 16, 1), [11, 13, 2, 0, 1]
    alone = [model(text.unsqueeze(0), prompt_lengths=[n]).logits[0] for text, n in zip(texts, prompts, strict=True)]
    for side in ("left", "right", "both"):
        ids, mask, places = pad(texts, side, fill=5)
        logits = model(ids, attention_mask=mask, prompt_lengths=prompts).logits
        for row, place in enumerate(places):
            assert_close(logits[row, place], alone[row])


def test_prompts_of_labels() -> None:
    labels = torch.tensor(
        [
            [-100, -100, 5, -100, 6, -100],  # two tokens of padding on the right
            [-100, -100, -100, 5, 6, 7],  # two on the left
            [4, 5, 6, 7, 8, 9],
            [-100, -100, -100, -100, -100, -100],
        ]
    )
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 0]])
    assert prompt_lengths_of_labels(labels, mask).tolist() == [2, 1, 0, 4]
    assert prompt_lengths_of_labels(labels).tolist() == [2, 3, 0, 6]


def test_prompts_come_from_labels_unless_they_are_given() -> None:
    model = small_model()
    (ids,) = random_texts(12)
    ids = ids.unsqueeze(0)
    labels = ids.clone()
    labels[:, :7] = -100
    logits = {length: model(ids, prompt_lengths=[length]).logits for length in (0, 5, 7)}
    assert not torch.allclose(logits[5], logits[7])
    torch.testing.assert_close(model(ids).logits, logits[0])
    torch.testing.assert_close(model(ids, labels=ids).logits, logits[0])
    torch.testing.assert_close(model(ids, labels=labels).logits, logits[7])
    torch.testing.assert_close(model(ids, labels=labels, prompt_lengths=[5]).logits, logits[5])
    # What follows a cache has no prompt, whatever its labels are.
    first = model(ids, prompt_lengths=[5])
    rest = random_texts(6)[0].unsqueeze(0)
    masked = rest.clone()
    masked[:, :4] = -100
    continued = model(rest, labels=masked, cache=first.cache).logits
    torch.testing.assert_close(continued, model(rest, cache=model(ids, prompt_lengths=[5]).cache).logits)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([5, 9], ValueError, "got 9 for sample 1 with 8 tokens"),
        ([-1, 2], ValueError, "got -1 for sample 0 with 5 tokens"),
        ([3], ValueError, "one length for each of the 2 samples, got shape \\(1,\\)"),
        ([1.0, 2.0], TypeError, "must be integers, got torch.float32"),
    ],
)
def test_wrong_prompts(lengths: list, error: type[Exception], message: str) -> None:
    ids, mask, _ = pad(random_texts(5, 8), "left")
    with pytest.raises(error, match=message):
        small_model()(ids, attention_mask=mask, prompt_lengths=lengths)


def test_wrong_inputs() -> None:
    model = small_model()
    ids = random_texts(5)[0].unsqueeze(0)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match=r"must have shape \(1, 5\), or more columns.*got \(1, 4\)"):
        model(ids, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"a cache of earlier tokens.*got \[3\]"):
        model(ids, cache=model(ids).cache, prompt_lengths=[3])


@variants
def test_embeddings_instead_of_ids(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    ids = torch.stack(random_texts(9, 9))
    expected = model(ids, prompt_lengths=[6, 4], output_hidden_states=True, output_trees=True)
    output = model(
        inputs_embeds=model.get_input_embeddings()(ids),
        prompt_lengths=torch.tensor([6, 4]),
        return_dict=False,
        logits_to_keep=2,
        use_cache=False,
    )
    torch.testing.assert_close(output[0], expected.logits[:, -2:])
    assert len(output) == 1
    assert len(expected.hidden_states) == 3
    if variant in ("published", "own decay"):
        assert [tree.parent.shape for tree in expected.trees] == [(2, 6), (2, 6)]
    elif variant == "causal":
        assert [tree.parent.shape for tree in expected.trees] == [(2, 9), (2, 9)]


def loss_and_gradients(model: GrootLForCausalLM) -> list[Tensor]:
    torch.manual_seed(0)
    ids, mask, _ = pad(random_texts(12, 9), "left")
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :12] = -100
    model.train()
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@variants
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(variant: str, use_reentrant: bool) -> None:
    model = small_model(**VARIANTS[variant])
    expected = loss_and_gradients(model)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    model.backbone.layers[0].norm.register_forward_hook(lambda *_: calls.append(1))
    for result, value in zip(loss_and_gradients(model), expected, strict=True):
        torch.testing.assert_close(result, value)
    assert len(calls) == 2


@variants
def test_float64_and_bfloat16_are_close_to_float32(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).requires_grad_(False)
    ids = torch.stack(random_texts(12, 12))
    prompts = [3, 12] if variant != "causal" else None
    # Where rounding makes another tree the best one, the results differ by more.
    trees = model(ids, prompt_lengths=prompts, output_trees=True).trees
    expected = model(ids, prompt_lengths=prompts).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, prompt_lengths=prompts, output_trees=True)
    rounded = small_model(**VARIANTS[variant]).requires_grad_(False).to(torch.bfloat16)
    for result in (output, rounded(ids, prompt_lengths=prompts, output_trees=True)):
        for tree, found in zip(trees, result.trees, strict=True):
            same = [True] * 2 if tree is None else (tree.parent == found.parent).all(1).tolist()
        for row in range(2):
            if same[row]:
                assert_close(result.logits[row], expected[row], 0.05)
    assert_close(model.double()(ids, prompt_lengths=prompts).logits, expected, 1e-4)


@pytest.mark.slow
def test_compiles() -> None:
    """Trees and scans are operators that the compiler sees as such."""
    model = small_model()
    ids = random_texts(12)[0].unsqueeze(0)
    expected = model(ids, prompt_lengths=[7], use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, prompt_lengths=[7], use_cache=False).logits, expected)
