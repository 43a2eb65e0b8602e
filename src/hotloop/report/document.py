"""``Document``: a report as JSON gave it, looked into without ever failing.

A report may be older than this version, of another command, cut by hand or hostile. What is
absent, of another type or not finite is ``None``: whoever draws it says that it is not known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# No figure of a run is larger; sums and powers of what is below stay finite.
_LARGEST = 1e30
# Control characters (a terminal would obey them), marks that turn the direction of what follows,
# and halves of surrogate pairs, which no encoding takes.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line, without characters that a terminal or a browser would obey."""
    return _SURROGATE.sub("\ufffd", " ".join(_UNPRINTABLE.sub("", text).split()))


def printable_part(text: str) -> str:
    """As ``printable``, but blanks at both ends stay: text beside other text needs them."""
    inner = text.strip()
    if not inner:
        return " " if text else ""
    at = text.index(inner)
    return " " * at + printable(inner) + " " * (len(text) - at - len(inner))


class Document:
    """One value of a report and what lies below it.

    Args:
        value: anything that ``json.loads`` gives.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def at(self, *path: str) -> Document:
        """What lies at the path; a document of ``None`` where there is nothing."""
        value = self.value
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return Document(value)

    def __bool__(self) -> bool:
        """Whether there is anything: neither ``None`` nor empty."""
        return self.value is not None and self.value not in ({}, [], "")

    def number(self, *path: str) -> float | None:
        """A finite number; truth values are none."""
        value = self.at(*path).value
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if abs(value) < _LARGEST and math.isfinite(value) else None

    def amount(self, *path: str) -> float | None:
        """A number that is not negative: bytes, seconds, counts, rates."""
        value = self.number(*path)
        return value if value is not None and value >= 0 else None

    def count(self, *path: str) -> int | None:
        """A whole number of at least 0."""
        value = self.amount(*path)
        return int(value) if value is not None and value == int(value) else None

    def flag(self, *path: str) -> bool | None:
        """A truth value."""
        value = self.at(*path).value
        return value if isinstance(value, bool) else None

    def text(self, *path: str) -> str | None:
        """Text that is not empty, made printable."""
        value = self.at(*path).value
        return printable(value) or None if isinstance(value, str) else None

    def items(self, *path: str) -> list[Document]:
        """The members of a list; empty where there is none."""
        value = self.at(*path).value
        return [Document(item) for item in value] if isinstance(value, list | tuple) else []

    def pairs(self, *path: str) -> Iterator[tuple[str, Document]]:
        """Keys, made printable, and what they lead to."""
        value = self.at(*path).value
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield printable(str(key)), Document(item)

    def shown(self, *path: str) -> str:
        """Any value as short text: text as it is, the rest as JSON."""
        value = self.at(*path).value
        if isinstance(value, str):
            return printable(value)
        if value is None:
            return "none"
        if isinstance(value, float) and math.isfinite(value):
            return f"{value:.6g}"
        if isinstance(value, list | tuple):
            return ", ".join(Document(item).shown() for item in value) or "none"
        try:
            return printable(json.dumps(value, default=str))
        except (ValueError, RecursionError):  # an integer of thousands of digits
            return "too large to show"
