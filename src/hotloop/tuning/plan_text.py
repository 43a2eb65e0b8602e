"""A plan as TOML whose lines carry their proof as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import tomli_w

from ..plan import Plan

_WIDTH = 100


def plan_with_comments(plan: Plan, comments: Mapping[str, str], heading: Sequence[str] = ()) -> str:
    """TOML that ``Plan.load`` reads, a comment above each knob that has one.

    Args:
        comments: by dotted knob name. A knob that is ``None`` has no line in TOML; its comment
            stands at the head of its part.
        heading: lines at the top of the file.
    """
    lines = [line for text in heading for line in _comment(text)]
    for part, values in plan.to_dict().items():
        lines += ["", f"[{part}]"] if lines else [f"[{part}]"]
        for name, value in values.items():
            comment = comments.get(f"{part}.{name}")
            if value is None:
                if comment is not None:
                    lines += _comment(f"{name} is not set. {comment}")
                continue
            if comment is not None:
                lines += _comment(comment)
            lines += tomli_w.dumps({name: value}).rstrip("\n").splitlines()
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    # A reason may hold what a program printed; TOML allows no control characters.
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return textwrap.wrap(
        flat, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
    ) or ["#"]
