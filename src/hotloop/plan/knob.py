"""A knob: one declaration from which default, rule, flag and help text are read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any, Literal

from ..errors import PlanError

AUTO: Literal["auto"] = "auto"


def knob(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    parse: Callable[[str], Any],
    flag: str | None = None,
    metavar: str | None = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field that is also a command-line flag and a key of the plan file."""
    metadata = {"help": help, "parse": parse, "flag": flag, "metavar": metavar}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def require_int(name: str, value: object, *, at_least: int, flag: str) -> None:
    """Raise ``PlanError`` unless ``value`` is a whole number of at least ``at_least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise PlanError(
            f"{name} must be a whole number of at least {at_least}",
            got=repr(value),
            next_step=f"set {name} = {at_least} or more ({flag})",
        )


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``PlanError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise PlanError(
            f"{name} must be one of {', '.join(choices)}",
            got=repr(value),
            next_step=f"use {near[0] if near else choices[0]!r}",
        )


def parse_int(text: str) -> int:
    """A whole number from text; ``1_000`` is allowed."""
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise PlanError("a whole number is needed", got=repr(text)) from None


def parse_float(text: str) -> float:
    """A number from text."""
    try:
        return float(text)
    except ValueError:
        raise PlanError("a number is needed", got=repr(text)) from None


def parse_threads(text: str) -> int | Literal["auto"]:
    """A whole number or ``auto`` from text."""
    return AUTO if text == AUTO else parse_int(text)


def parse_ints(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return tuple(parse_int(part) for part in text.split(",") if part.strip())


def knobs(kind: type) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and metadata of each knob of a part of the plan, in order."""
    for item in dataclasses.fields(kind):
        yield item.name, item.metadata
