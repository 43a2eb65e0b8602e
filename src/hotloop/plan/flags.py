"""Command-line flags generated from the knobs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import PlanError
from .knob import AUTO, knobs
from .parts import PARTS
from .plan import Plan


def flags() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """``(flag, dotted knob name, metadata)`` of every knob, in the plan's order."""
    for part, kind in PARTS.items():
        for name, metadata in knobs(kind):
            yield metadata["flag"] or "--" + name.replace("_", "-"), f"{part}.{name}", metadata


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--plan`` and one flag for each knob."""
    group = parser.add_argument_group("plan", "how the machine is used; never what is computed")
    group.add_argument(
        "--plan",
        default=AUTO,
        metavar="FILE",
        help="a TOML or JSON plan, 'default', or 'auto' (default)",
    )
    for flag, name, metadata in flags():
        group.add_argument(
            flag,
            dest=f"plan:{name}",
            metavar=metadata["metavar"],
            default=None,
            help=metadata["help"],
        )


def plan_from_flags(args: argparse.Namespace) -> Plan:
    """The plan named by ``--plan``, with the knobs given as flags changed.

    Raises:
        PlanError: a value cannot be read or breaks its rule; the flag is named.
    """
    if args.plan == AUTO:
        plan = Plan.auto()
    else:
        plan = Plan() if args.plan == "default" else Plan.load(args.plan)
    values = {}
    for flag, name, metadata in flags():
        text = getattr(args, f"plan:{name}")
        if text is None:
            continue
        try:
            values[name] = metadata["parse"](text)
        except ValueError as error:
            rule = getattr(error, "rule", str(error))
            raise PlanError(
                f"{flag}: {rule}", got=repr(text), next_step=getattr(error, "next_step", None)
            ) from None
    return plan.replace(values)
