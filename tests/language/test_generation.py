"""generate(): the input is the prompt, and decoding from a cache gives what full passes give."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from grootvl_mm.language import GrootLForCausalLM
from tests.helpers.small_language_models import SIZES, VARIANTS, pad, random_texts, small_model

variants = pytest.mark.parametrize("variant", VARIANTS)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@torch.no_grad()
def greedy(model: GrootLForCausalLM, ids: Tensor, prompt: int, count: int = 6) -> Tensor:
    """What full passes say, (count,)."""
    text = ids
    for _ in range(count):
        logits = model(text.unsqueeze(0), prompt_lengths=[prompt]).logits
        text = torch.cat([text, logits[0, -1:].argmax(-1)])
    return text[len(ids) :]


@variants
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_a_loop_of_full_passes(variant: str, use_cache: bool) -> None:
    """Of a batch with prompts of several lengths."""
    model = small_model(**VARIANTS[variant])
    texts = random_texts(13, 6, 1)
    ids, mask, _ = pad(texts, "left", fill=3)
    found = model.generate(ids, attention_mask=mask, use_cache=use_cache, **GREEDY)[:, ids.shape[1] :]
    for text, row in zip(texts, found, strict=True):
        assert row.tolist() == greedy(model, text, len(text)).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_is_recognized_without_a_mask(use_cache: bool) -> None:
    model = small_model(pad_token_id=60, eos_token_id=59)
    texts = [text % 59 for text in random_texts(13, 6)]
    ids, _, _ = pad(texts, "left", fill=60)
    found = model.generate(ids, use_cache=use_cache, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 17:]
    for text, row in zip(texts, found, strict=True):
        assert row.tolist() == greedy(model, text, len(text)).tolist()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("lengths", [[8, 0], torch.tensor([8, 0])])
def test_prompts_may_be_shorter_than_the_input(lengths: list[int] | Tensor, use_cache: bool) -> None:
    model = small_model()
    texts = random_texts(13, 13)
    found = model.generate(torch.stack(texts), prompt_lengths=lengths, use_cache=use_cache, **GREEDY)[:, 13:]
    for text, prompt, row in zip(texts, lengths, found, strict=True):
        assert row.tolist() == greedy(model, text, int(prompt)).tolist()


@torch.no_grad()
def beam_search(model: GrootLForCausalLM, ids: Tensor, beams: int, count: int) -> Tensor:
    """The most likely of the texts that are kept, by full passes."""
    texts, scores = ids.unsqueeze(0), torch.zeros(1)
    for _ in range(count):
        logits = model(texts, prompt_lengths=[len(ids)] * len(texts)).logits[:, -1]
        scores = (scores.unsqueeze(1) + logits.log_softmax(-1)).flatten()
        scores, best = scores.topk(beams)
        beam, token = best // SIZES["vocab_size"], best % SIZES["vocab_size"]
        texts = torch.cat([texts[beam], token.unsqueeze(1)], 1)
    return texts[0]


@variants
def test_beam_search(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    texts = random_texts(9, 7)
    ids, mask, _ = pad(texts, "left")
    found = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)[:, ids.shape[1] :]
    for text, row in zip(texts, found, strict=True):
        assert row.tolist() == beam_search(model, text, 3, 6)[len(text) :].tolist()


def test_samples_of_one_prompt_share_it() -> None:
    model = small_model()
    ids = random_texts(9)[0].unsqueeze(0)
    torch.manual_seed(0)
    cached = model.generate(ids, **(GREEDY | {"do_sample": True, "num_return_sequences": 3}))
    torch.manual_seed(0)
    found = model.generate(ids, use_cache=False, **(GREEDY | {"do_sample": True, "num_return_sequences": 3}))
    assert cached.tolist() == found.tolist()
    assert len({tuple(row) for row in cached.tolist()}) > 1


@variants
def test_generation_continues_a_cache(variant: str) -> None:
    """The prompt belongs to the call that filled the cache; what generate() gets then has none."""
    model = small_model(**VARIANTS[variant])
    prompt, rest = random_texts(9, 5)
    with torch.no_grad():
        cache = model(prompt.unsqueeze(0), prompt_lengths=[9]).cache
    found = model.generate(rest.unsqueeze(0), cache=cache, **GREEDY)[0, 5:]
    assert found.tolist() == greedy(model, torch.cat([prompt, rest]), 9).tolist()


@variants
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_padded_prompts_are_continued_in_chunks(variant: str, side: str) -> None:
    """Padding leaves no trace in the cache, on either side, also within the chunks."""
    model = small_model(**VARIANTS[variant])
    texts, prompts = random_texts(12, 7, 2), [8, 7, 2]
    first, second = random_texts(1, 3, 2), random_texts(5, 2, 4)
    ids, mask, _ = pad(texts, side, fill=4)
    cache = model(ids, attention_mask=mask, prompt_lengths=prompts).cache
    found = [[], [], []]
    for chunks in (first, second):
        ids, mask, places = pad(chunks, side, fill=4)
        output = model(ids, attention_mask=mask, cache=cache, output_hidden_states=True)
        torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
        for row, place in enumerate(places):
            found[row].append(output.logits[row, place])
    for row, prompt in enumerate(prompts):
        text = torch.cat([texts[row], first[row], second[row]])
        expected = model(text.unsqueeze(0), prompt_lengths=[prompt]).logits[0, len(texts[row]) :]
        torch.testing.assert_close(torch.cat(found[row]), expected, rtol=1e-4, atol=1e-4)


@variants
def test_a_cache_does_not_grow(variant: str) -> None:
    """Decoding keeps one state of a layer, whatever the length of the text; two or three where a variant needs them."""
    model = small_model(**VARIANTS[variant])
    cache = DynamicCache(config=model.config)
    sizes = []
    for count in (9, 1, 4):
        model(torch.stack(random_texts(count, count)), cache=cache)
        sizes.append([layer.recurrent_states[0].shape[1] for layer in cache.layers])
    states = 2 if variant.startswith("own") else 3 if variant == "causal" else 1
    assert sizes == [[states, states]] * 3
