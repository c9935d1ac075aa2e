"""Inject faults and check that nothing is lost, executed, deleted or left behind.

    python .dev_scripts/fault_campaign pickles checkpoints operators datasets   # in this process, takes minutes
    python .dev_scripts/fault_campaign kills stops converters                   # in forks, in parallel with --jobs
    python .dev_scripts/fault_campaign ranks links disks                        # trainings; needs an idle machine

Each part prints one line of results; the exit status is 1 if there was a fault. docs/reliability.md lists the results
so far. Faults are random and reproducible by --seed. With --state FOLDER, the parts in forks can be resumed after an
interruption.
"""

import argparse
import inspect
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".dev_scripts"), str(ROOT)]

from fault_campaign.datasets import datasets  # noqa: E402
from fault_campaign.files import checkpoints, pickles  # noqa: E402
from fault_campaign.interruptions import Recorded, converters, kills, stops  # noqa: E402
from fault_campaign.operators import operators  # noqa: E402
from fault_campaign.results import Result  # noqa: E402
from fault_campaign.trainings import disks, links, ranks  # noqa: E402

logger = logging.getLogger("fault_campaign")

PARTS: dict[str, tuple[Callable[..., Result], int]] = {
    "pickles": (pickles, 1),
    "checkpoints": (checkpoints, 1000),
    "operators": (operators, 10_000),
    "datasets": (datasets, 1000),
    "kills": (kills, 50),
    "stops": (stops, 20),
    "converters": (converters, 60),
    "ranks": (ranks, 6),
    "links": (links, 2),
    "disks": (disks, 5),
}


def run_parts(names: list[str], count: int | None, seed: int, recorded: Recorded) -> Iterator[tuple[str, Result]]:
    """Run some parts."""
    for name in names:
        part, default = PARTS[name]
        options = {"recorded": recorded} if "recorded" in inspect.signature(part).parameters else {}
        yield name, part(default if count is None else count, random.Random(f"{name} {seed}"), **options)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=".dev_scripts/fault_campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, help="parts to run")
    counts = ", ".join(f"{name} {count}" for name, (_, count) in PARTS.items())
    parser.add_argument("--count", type=int, help=f"number of cases (default: {counts})")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="parallel cases of kills, stops and converters (default: %(default)s)"
    )
    parser.add_argument(
        "--state", type=Path, help="folder to resume kills, stops and converters (default: no resuming)"
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    has_faults = False
    for name, result in run_parts(args.parts, args.count, args.seed, Recorded(args.state, args.jobs)):
        logger.info("%s: %s; %d faults", name, result.figures, len(result.faults))
        for fault in result.faults[:20]:
            logger.info("  %s", fault)
        has_faults |= bool(result.faults)
    sys.exit(has_faults)


if __name__ == "__main__":
    main()
