"""``--cfg-options`` that keeps the spaces of its values."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import DictAction

BRACKETS = {"(": ")", "[": "]"}
QUOTES = "'\""


class CfgOptions(DictAction):
    """Reads ``KEY=VALUE`` arguments as mmengine's ``DictAction`` does, which removes every space of a value.

    A value without a comma outside of brackets is a number, a boolean, None, or a string, and a string is taken as it
    was given, such as a path with spaces. Spaces around the items of a list mean nothing. Quotes around a value or an
    item, which a shell may have left, are dropped. What is no ``KEY=VALUE``, or has brackets that do not match in a
    list, is an error of the command line.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Add the values to those of earlier ``--cfg-options``."""
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
        """The value that a text stands for; the name is that of the method of ``DictAction`` that it replaces."""
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
    """Whether one pair of brackets holds all of a text."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char in BRACKETS) - (char in BRACKETS.values())
        if depth == 0:
            return index > 0 and index == len(text) - 1
    return False


def _split(text: str) -> Iterator[str]:
    """Yield what is between the commas outside of brackets; a comma at the end is not followed by anything."""
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
