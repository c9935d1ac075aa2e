"""Instruction data in Alpaca format: records, prompts, token ids with masked prompts, and batches.

A file is a JSON list, or JSON Lines, of objects with the strings ``instruction``, ``output`` and optionally ``input``.
A template turns instruction and input into the prompt; the answer is the output and the end-of-sequence token. The loss
covers the answer only, and GrootL's tree spans the prompt only, so every example includes the length of its prompt.
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

from grootvl_mm.language.prompts import IGNORED

EXPECTED = "an object with the strings 'instruction', 'output' and optionally 'input'"
SHOWN = 80  # characters of a wrong value in a message

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Invalid data; the message says where, what was found and what was expected."""


class Record(NamedTuple):
    """An instruction with its answer."""

    instruction: str
    output: str
    input: str = ""


class PromptTemplate(NamedTuple):
    """Format strings that turn instruction and input into a prompt.

    The default is the authors': Alpaca's template without its preamble.
    """

    with_input: str = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    without_input: str = "### Instruction:\n{instruction}\n\n### Response:"

    def prompt(self, instruction: str, input: str = "") -> str:
        """The prompt for an instruction and its optional input."""
        chosen = self.with_input if input else self.without_input
        try:
            return chosen.format(instruction=instruction, input=input)
        except (KeyError, IndexError) as error:
            raise DataError(
                f"the template {_shown(chosen)} has the field {error}; only {{instruction}} and {{input}} are allowed"
            ) from None


def read_records(path: str | Path) -> list[Record]:
    """Read a file in Alpaca format.

    Args:
        path: A JSON list, or JSON Lines if the name ends in ``.jsonl``. Other keys of a record are ignored.

    Raises:
        DataError: The file is missing, empty or not JSON, or a record is invalid.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    records = _json_lines(path, text) if path.suffix == ".jsonl" else _json(path, text)
    if not isinstance(records, list):
        raise DataError(f"{path} holds {_shown(records)}; expected a list, each item {EXPECTED}")
    if not records:
        raise DataError(f"{path} has no records; expected at least one, {EXPECTED}")
    return [_checked(record, f"{path}, record {index}") for index, record in enumerate(records)]


def _json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: invalid JSON ({error.msg}); expected a list in Alpaca format, "
            "or one object per line if the file name ends in .jsonl"
        ) from None


def _json_lines(path: Path, text: str) -> list[Any]:
    return [_json(path, line, number) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _checked(record: Any, place: str) -> Record:
    if not isinstance(record, Mapping):
        raise DataError(f"{place} is {_shown(record)}; expected {EXPECTED}")
    for key in ("instruction", "output"):
        if key not in record:
            raise DataError(
                f"{place} has no {key!r}, found {', '.join(map(repr, record)) or 'nothing'}; expected {EXPECTED}"
            )
    found = Record(record["instruction"], record["output"], record.get("input") or "")
    for key, value in found._asdict().items():
        if not isinstance(value, str):
            raise DataError(f"{place}: {key!r} is {_shown(value)}; expected a string")
    if not found.instruction.strip():
        raise DataError(f"{place}: 'instruction' is empty; expected a non-empty string")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:SHOWN]}{'...' if len(text) > SHOWN else ''}"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's beginning-of-sequence token but without its end-of-sequence token."""
    encoded = tokenizer(list(prompts), padding=False, truncation=False)["input_ids"]
    ends_by_itself = bool(tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id])
    return [ids[:-1] if ends_by_itself else ids for ids in encoded]


class InstructionDataset(Dataset):
    """Encoded records, each a dict of ``input_ids``, ``labels`` and ``prompt_length``.

    Prompt and answer are encoded separately, so that no token spans their boundary, and a prompt has the same ids in
    training and generation.

    Args:
        records: See :func:`read_records`.
        tokenizer: Must have an end-of-sequence token.
        max_length: Maximum number of tokens of an example.
        template: Template of the prompts.
        overlong: How to treat longer examples: ``"cut_prompt"`` truncates the beginning of the prompt but never the
            answer, ``"drop"`` drops the example, and ``"error"`` raises an error. The numbers of truncated and dropped
            examples are logged.
        source: Name of the data in messages.

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
                "the tokenizer has no end-of-sequence token, so that no answer would end; set its eos_token"
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
                "%s: of %d examples, %d were truncated and %d dropped, because of max_length=%d.",
                *(source, len(records), self.num_cut, self.num_dropped, max_length),
            )
        if not self.examples:
            raise DataError(f"{source}: no example has at most {max_length} tokens; raise max_length")

    def _add(self, index: int, prompt: list[int], answer: list[int]) -> None:
        place = f"{self.source}, record {index}"
        if not prompt:
            raise DataError(f"{place}: the prompt has no tokens; expected at least one")
        excess = len(prompt) + len(answer) - self.max_length
        if excess > 0:
            if self.overlong == "drop":
                self.num_dropped += 1
                return
            if self.overlong == "error" or excess >= len(prompt):
                raise DataError(
                    f"{place} has {len(prompt)} prompt tokens and {len(answer)} answer tokens; expected at most "
                    f"{self.max_length} in total; raise max_length, or set overlong='drop' to drop such records"
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
    """Collates examples into a batch, padded to the longest.

    Args:
        pad_token_id: Id of padding. Results do not depend on it, because padding is masked and its labels are ignored.
        padding_side: Side of the padding; results do not depend on it.
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
