"""The model ``grootl`` of lm-evaluation-harness."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from grootvl_mm.language.evaluation import GrootLLM
from tests.helpers.language import make_model, make_tokenizer, words


def request(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments, task_name="test")


def harness(model: torch.nn.Module | None = None, **settings: object) -> GrootLLM:
    return GrootLLM(model or make_model(), tokenizer=make_tokenizer(), **settings)


def by_hand(model: torch.nn.Module, context: str, continuation: str, max_length: int = 10**6) -> float:
    """The log-probability of a continuation, alone and without padding."""
    tokenizer = make_tokenizer()
    prompt, answer = (tokenizer(text)["input_ids"] for text in (context, continuation))
    ids = (prompt + answer)[-max_length - 1 :]
    length = len(ids) - len(answer)
    logits = model(torch.tensor([ids[:-1]]), prompt_lengths=torch.tensor([length])).logits[0]
    log_probs = logits.log_softmax(-1)[-len(answer) :]
    return sum(row[token].item() for row, token in zip(log_probs, answer, strict=True))


def following(count: int, start: int = 0) -> str:
    """A text as it follows another one."""
    return f" {words(count, start)}"


PAIRS = [
    (words(12), following(2, 5)),
    (words(3), following(6, 1)),
    (words(25, 9), following(1, 2)),
    (words(1), following(3)),
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_have_the_prompt_of_each_request(batch_size: int) -> None:
    lm = harness(batch_size=batch_size)
    scores = lm.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)
    expected = [by_hand(lm.model, *pair) for pair in PAIRS]
    torch.testing.assert_close(
        torch.tensor([score for score, _ in scores]), torch.tensor(expected), rtol=1e-5, atol=1e-4
    )
    # The prompts matter where there is a choice of trees.
    chain = harness(make_model(tree_reach=1))
    others = chain.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)
    differ = [abs(one - other) > 1e-2 for (one, _), (other, _) in zip(scores, others, strict=True)]
    assert differ[0]
    assert differ[2]
    assert not differ[3]


def test_truncation_shortens_the_prompt() -> None:
    lm = harness(batch_size=2, max_length=10)
    scores = lm.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)
    expected = [by_hand(lm.model, *pair, max_length=10) for pair in PAIRS]
    torch.testing.assert_close(
        torch.tensor([score for score, _ in scores]), torch.tensor(expected), rtol=1e-5, atol=1e-4
    )
    with pytest.raises(ValueError, match="has 11 tokens; expected 1 to max_length=10"):
        lm.loglikelihood([request(words(3), following(11))], disable_tqdm=True)


def test_single_token_choices_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = harness(batch_size=4)
    choices = [request(words(8), word) for word in (" w1", " w2", " w3")]
    # Same tokens, another prompt: nothing to share.
    others = [request(words(7), f" {words(8).split()[-1]} w1")]
    sizes = []
    forward = lm._logits
    monkeypatch.setattr(lm, "_logits", lambda inputs: sizes.append(len(inputs)) or forward(inputs))
    scores = lm.loglikelihood([*choices, *others], disable_tqdm=True)
    assert sizes == [2]
    expected = [by_hand(lm.model, *choice.args) for choice in [*choices, *others]]
    torch.testing.assert_close(
        torch.tensor([score for score, _ in scores]), torch.tensor(expected), rtol=1e-5, atol=1e-4
    )


def test_greedy_continuations_are_recognized() -> None:
    lm = harness()
    tokenizer = make_tokenizer()
    prompt = torch.tensor([tokenizer(words(9))["input_ids"]])
    found = lm.model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 9:]
    greedy = tokenizer.decode(found)
    other = tokenizer.decode([*found[:-1], 2 + (int(found[-1]) - 1) % 40])
    flags = [flag for _, flag in lm.loglikelihood([request(words(9), f" {text}") for text in (greedy, other)], True)]
    assert flags == [True, False]


def test_empty_context_has_the_end_of_sequence_as_its_prompt() -> None:
    lm = harness()
    ((score, _),) = lm.loglikelihood([request("", words(4))], disable_tqdm=True)
    ids = torch.tensor([[0, *make_tokenizer()(words(4))["input_ids"]]])
    log_probs = lm.model(ids[:, :-1], prompt_lengths=torch.tensor([1])).logits[0].log_softmax(-1)
    assert score == pytest.approx(log_probs.gather(1, ids[0, 1:, None]).sum().item(), abs=1e-4)


def test_rolling_likelihood_is_causal() -> None:
    """A text is as likely as its beginning times the rest: no token has seen a later one."""
    lm = harness(max_length=64, batch_size=2)
    texts = [words(length) for length in (5, 9, 20)]
    rolled = lm.loglikelihood_rolling([request(text) for text in texts], disable_tqdm=True)
    ids = torch.tensor([[0, *make_tokenizer()(texts[-1])["input_ids"]]])
    log_probs = lm.model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    expected = [log_probs[:length].sum().item() for length in (5, 9, 20)]
    assert rolled == pytest.approx(expected, abs=1e-3)
    assert all(longer < shorter for shorter, longer in pairwise(rolled))


def test_generation_takes_the_context_as_prompt() -> None:
    lm = harness(batch_size=3)
    contexts = [words(4), words(11, 3), words(7, 2)]
    settings = {"max_gen_toks": 5, "until": ["w99"], "do_sample": False}
    answers = lm.generate_until([request(context, settings) for context in contexts], disable_tqdm=True)
    tokenizer = make_tokenizer()
    for context, answer in zip(contexts, answers, strict=True):
        prompt = torch.tensor([tokenizer(context)["input_ids"]])
        alone = lm.model.generate(prompt, max_new_tokens=5, do_sample=False)
        assert answer.split() == tokenizer.decode(alone[0, prompt.shape[1] :], skip_special_tokens=True).split()


def test_batch_size_is_found_with_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = harness(batch_size="auto", max_batch_size=2)
    seen = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda *a, **k: seen.append(k.get("prompt_lengths")) or forward(*a, **k))
    lm.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)
    assert seen[0].tolist() == [25, 25]  # as many as there may be, each of the longest request
    # Afterwards, calls of the harness itself are causal again.
    lm._model_call(torch.ones(1, 4, dtype=torch.long))
    assert seen[-1] is None


def test_loads_models_with_settings(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lm = GrootLLM(str(tmp_path), device="cpu", tree_scale=0.0)
    assert lm.model.config.tree_scale == 0
    assert GrootLLM(str(tmp_path), device="cpu").model.config.tree_scale == 0.3
