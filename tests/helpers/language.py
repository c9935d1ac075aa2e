"""Tiny language models with tokenizers, made without any download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grootvl_mm.language import GrootLConfig, GrootLForCausalLM

WORDS = [f"w{index}" for index in range(40)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word ``w0`` to ``w39``, whose ids are 2 to 41."""
    vocabulary = {"<end>": 0, "<unknown>": 1, **{word: index for index, word in enumerate(WORDS, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")


def make_model(**settings: object) -> GrootLForCausalLM:
    """Random weights for the tokenizer above, large enough for trees to change the logits by a tenth and more."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 42, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = GrootLForCausalLM(GrootLConfig(**{**sizes, **ids, **settings}))
    with torch.no_grad():
        model.backbone.embeddings.weight.mul_(20)
        for name, parameter in model.named_parameters():
            if "_proj.weight" in name:
                parameter.mul_(4)
    return model.eval()


def save_base(folder: Path, **settings: object) -> PreTrainedModel:
    """Write model and tokenizer as ``from_pretrained`` reads them."""
    model = make_model(**settings)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def words(count: int, start: int = 0) -> str:
    """A text of that many tokens."""
    return " ".join(WORDS[(start + 7 * index) % len(WORDS)] for index in range(count))
