"""What a search chooses among: differences to the present plan, in groups that belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Knob to value, by dotted name; empty: the present plan.
Candidate = Mapping[str, Any]
PRESENT: Candidate = {}


def key_of(candidate: Candidate) -> str:
    """One text for one candidate, whatever the order of its knobs."""
    return json.dumps(dict(sorted(candidate.items())), sort_keys=True)


def text_of(candidate: Candidate) -> str:
    """For people: ``"num_workers 2, thread_affinity compact"``."""
    parts = [
        f"{name.rpartition('.')[2]} {'none' if value is None else value}"
        for name, value in candidate.items()
    ]
    return ", ".join(parts) or "the present plan"


@dataclass(frozen=True)
class Group:
    """Choices of which at most one is taken.

    Attributes:
        name: what is chosen, such as ``"cores"``.
        choices: each the knobs it sets; the present values are a choice by themselves.
        unless: given what was chosen so far, why the group cannot matter; ``None``: it may.
    """

    name: str
    choices: tuple[Candidate, ...]
    unless: Callable[[Candidate], str | None] = field(default=lambda _: None, compare=False)
