"""Results of the parts of the campaign."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Seconds until a training on a busy machine has completed its first step, and until all of its processes have ended.
# The figures report the actual times.
TO_START, TO_END = 1800, 600


class Result(NamedTuple):
    """The summary of a part, and its faults."""

    figures: str
    faults: list[str]
