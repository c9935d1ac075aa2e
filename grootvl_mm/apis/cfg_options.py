"""``--cfg-options`` that preserves spaces in values."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import DictAction

BRACKETS = {"(": ")", "[": "]"}
QUOTES = "'\""


class CfgOptions(DictAction):
    """mmengine's ``DictAction`` for ``KEY=VALUE`` arguments, except that it does not strip spaces from values.

    A value with no comma outside brackets is a number, a boolean, None or a string; strings, such as paths with spaces,
    are kept verbatim. Spaces around list items are ignored. Quotes around a value or an item, which a shell may have
    left in place, are dropped. Anything other than ``KEY=VALUE``, and unbalanced brackets in a list, are command line
    errors.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Merge the values into those of earlier ``--cfg-options``."""
        for text in values or ():
            key, equals, _ = text.partition("=")
            if not key.strip() or not equals:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {text!r}")
        try:
            super().__call__(parser, namespace, values, option_string)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """Parse one value; overrides the ``DictAction`` method of this name."""
        val = val.strip(QUOTES)
        bare = val.strip()
        if _is_enclosed(bare):
            items = [CfgOptions._parse_iterable(item) for item in _split(bare[1:-1])]
            return tuple(items) if bare[0] == "(" else items
        if "," in bare and (items := list(_split(bare))) != [bare]:
            return [CfgOptions._parse_iterable(item) for item in items]
        parsed = DictAction._parse_int_float_bool(bare)
        return val if isinstance(parsed, str) else parsed


def _is_enclosed(text: str) -> bool:
    """Whether a single pair of brackets encloses the whole text."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in BRACKETS) - (char in BRACKETS.values())
        if depth == 0:
            return index > 0 and index == len(text) - 1
    return False


def _split(text: str) -> Iterator[str]:
    """Split a text at the commas outside brackets; a trailing comma adds no item."""
    closing: list[str] = []
    start = 0
    for index, char in enumerate(text):
        if char in BRACKETS:
            closing.append(BRACKETS[char])
        elif char in BRACKETS.values():
            if not closing or closing.pop() != char:
                raise ValueError(f"the brackets of {text!r} do not match")
        elif char == "," and not closing:
            yield text[start:index].strip()
            start = index + 1
    if closing:
        raise ValueError(f"the brackets of {text!r} do not match")
    if text[start:].strip():
        yield text[start:].strip()
