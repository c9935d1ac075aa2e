"""Instruction data in Alpaca's format: records, prompts, token ids with masked prompts, and batches.

A file is a JSON list, or JSON Lines, of objects with the texts ``instruction``, ``output`` and maybe ``input``. The
prompt is what a template makes of instruction and input; the answer is the output and the end-of-sequence token. Only
the answer is trained, and the tree of GrootL spans the prompt only, so every example says how long its prompt is.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of what is not trained, as everywhere in transformers
EXPECTED = "an object with the texts 'instruction', 'output' and maybe 'input'"
SHOWN = 80  # characters of a wrong value in a message

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used; the message says where it is, what came and what was expected."""


class Record(NamedTuple):
    """One instruction with its answer."""

    instruction: str
    output: str
    input: str = ""


class PromptTemplate(NamedTuple):
    """How instruction and input become a prompt; the fields are format strings.

    The default is that of the published GrootL: Alpaca's, without its preamble.
    """

    with_input: str = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    without_input: str = "### Instruction:\n{instruction}\n\n### Response:"

    def prompt(self, instruction: str, input: str = "") -> str:
        """The prompt of an instruction and its input, which may be empty."""
        chosen = self.with_input if input else self.without_input
        try:
            return chosen.format(instruction=instruction, input=input)
        except (KeyError, IndexError) as error:
            raise DataError(
                f"the template {_shown(chosen)} asks for {error}; expected no fields but {{instruction}} and {{input}}"
            ) from None


def read_records(path: str | Path) -> list[Record]:
    """Read a file in Alpaca's format.

    Args:
        path: A JSON list, or JSON Lines if the name ends in ``.jsonl``. Further keys of a record are not looked at.

    Raises:
        DataError: The file is missing, empty or no JSON, or one of its records is not as described.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    records = _json_lines(path, text) if path.suffix == ".jsonl" else _json(path, text)
    if not isinstance(records, list):
        raise DataError(f"{path} holds {_shown(records)}; expected a list, each item {EXPECTED}")
    if not records:
        raise DataError(f"{path} holds no record; expected at least one, {EXPECTED}")
    return [_checked(record, f"{path}, record {index}") for index, record in enumerate(records)]


def _json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: no valid JSON ({error.msg}); expected a list in Alpaca's "
            "format, or one object a line in a file whose name ends in .jsonl"
        ) from None


def _json_lines(path: Path, text: str) -> list[Any]:
    return [_json(path, line, number) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _checked(record: Any, place: str) -> Record:
    if not isinstance(record, Mapping):
        raise DataError(f"{place} is {_shown(record)}; expected {EXPECTED}")
    for key in ("instruction", "output"):
        if key not in record:
            raise DataError(
                f"{place} has no {key!r}, only {', '.join(map(repr, record)) or 'nothing'}; expected {EXPECTED}"
            )
    found = Record(record["instruction"], record["output"], record.get("input") or "")
    for key, value in found._asdict().items():
        if not isinstance(value, str):
            raise DataError(f"{place}: {key!r} is {_shown(value)}; expected a text")
    if not found.instruction.strip():
        raise DataError(f"{place}: 'instruction' is empty; expected what the model is asked")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:SHOWN]}{'...' if len(text) > SHOWN else ''}"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts: with what the tokenizer puts before a text, without the end that some put after it."""
    encoded = tokenizer(list(prompts), padding=False, truncation=False)["input_ids"]
    ends_by_itself = bool(tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id])
    return [ids[:-1] if ends_by_itself else ids for ids in encoded]


class InstructionDataset(Dataset):
    """Encoded records, each a dict of ``input_ids``, ``labels`` and ``prompt_length``.

    Prompt and answer are encoded apart, so no token lies across their border, and a prompt has in training the ids that
    it has in generation.

    Args:
        records: See :func:`read_records`.
        tokenizer: Must have an end-of-sequence token.
        max_length: Most tokens of an example.
        template: Makes the prompts.
        overlong: What happens to examples with more tokens. ``"cut_prompt"`` removes the beginning of the prompt and
            never anything of the answer, ``"drop"`` leaves the example out, and ``"error"`` raises an error. How many
            were cut or left out is logged.
        source: Where the records come from, for messages.

    Raises:
        DataError: The tokenizer has no end-of-sequence token, an example is too long (with ``"cut_prompt"``: its answer
            alone), or no example is left.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 2048,
        template: PromptTemplate | None = None,
        overlong: Literal["cut_prompt", "drop", "error"] = "cut_prompt",
        source: str = "the data",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, without which no answer ends; set its eos_token"
            )
        if overlong not in ("cut_prompt", "drop", "error"):
            raise ValueError(f"overlong is {overlong!r}; expected 'cut_prompt', 'drop' or 'error'")
        self.max_length = max_length
        self.overlong = overlong
        self.source = source
        template = template or PromptTemplate()
        prompts = encode_prompts(tokenizer, [template.prompt(record.instruction, record.input) for record in records])
        answers = tokenizer([record.output for record in records], add_special_tokens=False)["input_ids"]
        self.examples: list[dict[str, Any]] = []
        self.num_cut = self.num_dropped = 0
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            self._add(index, prompt, [*answer, tokenizer.eos_token_id])
        if self.num_cut or self.num_dropped:
            logger.warning(
                "%s: of %d examples, %d lost the beginning of their prompt and %d were left out: at most %d tokens.",
                *(source, len(records), self.num_cut, self.num_dropped, max_length),
            )
        if not self.examples:
            raise DataError(f"{source}: no example has at most {max_length} tokens; raise max_length")

    def _add(self, index: int, prompt: list[int], answer: list[int]) -> None:
        place = f"{self.source}, record {index}"
        if not prompt:
            raise DataError(f"{place}: the prompt has no token; expected at least one, from which the answer begins")
        excess = len(prompt) + len(answer) - self.max_length
        if excess > 0:
            if self.overlong == "drop":
                self.num_dropped += 1
                return
            if self.overlong == "error" or excess >= len(prompt):
                raise DataError(
                    f"{place} has {len(prompt)} tokens of prompt and {len(answer)} of answer; expected at most "
                    f"{self.max_length} together; raise max_length, or set overlong='drop' to leave such records out"
                )
            prompt = prompt[excess:]
            self.num_cut += 1
        labels = [IGNORED] * len(prompt) + answer
        self.examples.append({"input_ids": prompt + answer, "labels": labels, "prompt_length": len(prompt)})

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example."""
        return self.examples[index]


class PromptCollator:
    """Makes a batch of examples, padded to the longest.

    Args:
        pad_token_id: Any id: the attention mask tells padding from tokens, and its labels are ignored.
        padding_side: Where the padding goes; results do not depend on it.
    """

    def __init__(self, pad_token_id: int, padding_side: Literal["left", "right"] = "right") -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; expected 'left' or 'right'")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, (B, L), and ``prompt_lengths``, (B,), all int64."""
        length = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": [self._pad(example["input_ids"], self.pad_token_id, length) for example in examples],
            "attention_mask": [self._pad([1] * len(example["input_ids"]), 0, length) for example in examples],
            "labels": [self._pad(example["labels"], IGNORED, length) for example in examples],
            "prompt_lengths": [example["prompt_length"] for example in examples],
        }
        return {name: torch.tensor(values) for name, values in batch.items()}

    def _pad(self, values: Sequence[int], value: int, length: int) -> list[int]:
        padding = [value] * (length - len(values))
        return [*padding, *values] if self.padding_side == "left" else [*values, *padding]
