"""grootvl_mm.language.data: records, prompts, masks, truncation and batches."""

import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from grootvl_mm.language.data import (
    IGNORED,
    DataError,
    InstructionDataset,
    PromptCollator,
    PromptTemplate,
    Record,
    encode_prompts,
    read_records,
)
from tests.helpers.language import make_model, make_tokenizer, words

GOOD = {"instruction": "Add.", "input": "1 1", "output": "2"}
PLAIN = PromptTemplate("{instruction} {input}", "{instruction}")


def record(prompt: int, answer: int) -> Record:
    return Record(words(prompt), words(answer, start=3))


def write(folder: Path, content: object) -> Path:
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_prompt_is_that_of_alpaca_without_preamble() -> None:
    template = PromptTemplate()
    assert template.prompt("Add.", "1 1") == "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:"
    assert template.prompt("Say {x}.") == "### Instruction:\nSay {x}.\n\n### Response:"
    with pytest.raises(DataError, match=r"'output'.*only \{instruction\} and \{input\} are allowed"):
        PromptTemplate(without_input="{output}").prompt("Add.")


def test_reads_lists_and_lines(tmp_path: Path) -> None:
    records = [GOOD, {"instruction": "Go.", "output": "", "source": "further keys do not matter"}]
    expected = [Record("Add.", "2", "1 1"), Record("Go.", "")]
    assert read_records(write(tmp_path, records)) == expected
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert read_records(lines) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "data.json, line 1, column 3: invalid JSON"),
        ({"data": [GOOD]}, "holds dict .*; expected a list"),
        ([], "has no records"),
        ([GOOD, "text"], "record 1 is str 'text'; expected an object"),
        ([GOOD, GOOD, {"instruction": "Add."}], "record 2 has no 'output', found 'instruction'"),
        ([{"prompt": "a", "output": "b"}], "record 0 has no 'instruction', found 'prompt', 'output'"),
        ([{**GOOD, "output": 2}], "record 0: 'output' is int 2; expected a string"),
        ([{**GOOD, "input": ["a"]}], "record 0: 'input' is list"),
        ([GOOD, {**GOOD, "instruction": " "}], "record 1: 'instruction' is empty"),
    ],
)
def test_bad_records_are_named(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_records(write(tmp_path, content))
    assert "data.json" in str(caught.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none.json: No such file"):
        read_records(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(DataError, match=r"bytes\.json is not UTF-8 text"):
        read_records(tmp_path / "bytes.json")
    (tmp_path / "lines.jsonl").write_text(json.dumps(GOOD) + "\n{}x\n")
    with pytest.raises(DataError, match="line 2, column 3"):
        read_records(tmp_path / "lines.jsonl")


@pytest.mark.parametrize(("prompt", "answer"), [(1, 0), (1, 5), (9, 1), (6, 4)])
def test_only_the_answer_is_trained(prompt: int, answer: int) -> None:
    tokenizer = make_tokenizer()
    (example,) = InstructionDataset([record(prompt, answer)], tokenizer, template=PLAIN)
    whole = tokenizer(f"{words(prompt)} {words(answer, start=3)}")["input_ids"]
    assert example["input_ids"] == [*whole, tokenizer.eos_token_id]
    assert example["prompt_length"] == prompt
    assert example["labels"] == [IGNORED] * prompt + example["input_ids"][prompt:]


def test_too_long_prompts_lose_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    records = [record(6, 3), record(2, 3), record(4, 5)]
    whole = InstructionDataset(records, make_tokenizer(), template=PLAIN)
    with caplog.at_level(logging.WARNING):
        cut = InstructionDataset(records, make_tokenizer(), max_length=7, template=PLAIN, source="a.json")
    assert "a.json: of 3 examples, 2 were truncated" in caplog.text
    for before, after in zip(whole, cut, strict=True):
        assert after["input_ids"] == before["input_ids"][-7:]
        assert after["labels"] == before["labels"][-7:]
        assert after["prompt_length"] == after["labels"].count(IGNORED)


def test_an_answer_is_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    records = [record(1, 2), record(3, 7), record(3, 2)]
    # Seven words and the end leave no room for a prompt.
    with pytest.raises(DataError, match=r"a.json, record 1 has 3 prompt tokens and 8 answer tokens; .* at most 8 "):
        InstructionDataset(records, make_tokenizer(), max_length=8, template=PLAIN, source="a.json")
    with pytest.raises(DataError, match="record 2 has 3 prompt tokens and 3 answer tokens"):
        InstructionDataset([records[0], records[0], records[2]], make_tokenizer(), 5, PLAIN, overlong="error")
    with caplog.at_level(logging.WARNING):
        kept = InstructionDataset(records, make_tokenizer(), max_length=5, template=PLAIN, overlong="drop")
    assert len(kept) == 1
    assert "2 dropped" in caplog.text
    with pytest.raises(DataError, match="no example has at most 2 tokens"):
        InstructionDataset(records, make_tokenizer(), max_length=2, template=PLAIN, overlong="drop")


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="overlong is 'cut'; expected 'cut_prompt', 'drop' or 'error'"):
        InstructionDataset([record(1, 1)], make_tokenizer(), overlong="cut")
    with pytest.raises(ValueError, match="padding_side is 'both'"):
        PromptCollator(0, padding_side="both")
    endless = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        InstructionDataset([record(1, 1)], endless)
    with pytest.raises(DataError, match="record 0: the prompt has no tokens"):
        InstructionDataset([record(1, 1)], make_tokenizer(), template=PromptTemplate(without_input=""))


def test_prompt_keeps_what_a_tokenizer_begins_with_but_not_the_end() -> None:
    tokenizer = make_tokenizer()
    plain = tokenizer(words(3))["input_ids"]
    ends = [("<end>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A <end>", special_tokens=ends)
    assert encode_prompts(tokenizer, [words(3)]) == [[0, *plain]]
    (example,) = InstructionDataset([record(3, 2)], tokenizer, template=PLAIN)
    assert example["input_ids"].count(0) == 2  # the beginning, and one end


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_is_padded_and_gives_each_sample_its_loss(side: str) -> None:
    examples = list(InstructionDataset([record(2, 1), record(9, 4), record(5, 8)], make_tokenizer(), template=PLAIN))
    model = make_model()
    batch = PromptCollator(0, side)(examples)
    assert {name: tuple(values.shape) for name, values in batch.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "labels"), (3, 14)),
        "prompt_lengths": (3,),
    }
    assert batch["prompt_lengths"].tolist() == [2, 9, 5]
    assert batch["attention_mask"].sum(1).tolist() == [4, 14, 14]
    padding = batch["attention_mask"] == 0
    assert padding[0].nonzero().flatten().tolist() == list(range(10) if side == "left" else range(4, 14))
    assert (batch["labels"][padding] == IGNORED).all()
    counts = torch.tensor([(values != IGNORED).sum() for values in batch["labels"]])
    single = torch.stack([model(**PromptCollator(0)([example])).loss for example in examples])
    torch.testing.assert_close(model(**batch).loss, (single * counts).sum() / counts.sum())
