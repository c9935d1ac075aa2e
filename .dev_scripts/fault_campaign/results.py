"""What a part of the campaign comes to."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    """Figures of a part, and what went wrong."""

    figures: str
    faults: list[str]
