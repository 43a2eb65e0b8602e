"""``hotloop tune``: search the plan by measurement, and write it with its proof."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..plan import Plan, add_plan_flags, plan_from_flags
from ..units import format_rate, format_seconds
from .recipe import Recipe, add_recipe_flags, recipe_from_flags, trial_source
from .text import aligned

if TYPE_CHECKING:
    from ..machine import Machine
    from ..train.tune_result import TuneResult
    from ..train.tuner import TuneProgress

NAME = "tune"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="find the fastest plan by measurement, with proof",
        description="Search the plan on your model and data: candidates train in fresh processes, "
        "in turn. What is proven faster is written to a plan file and used by --plan auto.",
    )
    group = parser.add_argument_group("search", "what is tried, and for how long")
    group.add_argument(
        "--budget-s", type=float, default=120.0, metavar="S", help="seconds in all (default: 120)"
    )
    group.add_argument(
        "--out", type=Path, default=Path("hotloop.toml"), metavar="FILE",
        help="the plan, .toml with the proof of each line or .json (default: hotloop.toml)",
    )  # fmt: skip
    group.add_argument(
        "--allow-precision", action="store_true", help="try bfloat16 too; it changes results"
    )
    group.add_argument(
        "--batch-sizes", metavar="A,B", help="try these too; needs --lr-rule; it changes results"
    )
    group.add_argument(
        "--lr-rule", choices=("linear", "sqrt", "none"), default=None,
        help="how the learning rate follows another batch size",
    )  # fmt: skip
    group.add_argument(
        "--journal", type=Path, metavar="FILE", help="of an unfinished search (default: the cache)"
    )
    group.add_argument("--fresh", action="store_true", help="do not go on with an unfinished one")
    group.add_argument(
        "--no-remember", dest="remember", action="store_false", help="not for --plan auto"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_recipe_flags(parser)
    add_plan_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune, write the plan, print what was tried; returns the exit code."""
    plan = plan_from_flags(args)
    sizes = _batch_sizes(args)
    recipe = recipe_for_trials(args, NAME)
    machine, present = present_plan(plan)
    from ..files import write_text_atomically
    from ..train.tuner import heading, tune_source

    with progress_line(quiet=args.quiet) as show:
        result = tune_source(
            trial_source(recipe),
            present,
            machine,
            budget_s=args.budget_s,
            allow_precision=args.allow_precision,
            batch_sizes=sizes,
            lr_rule=args.lr_rule or "none",
            journal=args.journal,
            fresh=args.fresh,
            keep=args.remember,
            on_progress=lambda progress: show(_line(progress)),
        )
    if args.out.suffix == ".json":
        result.plan.save(args.out)
    else:
        write_text_atomically(args.out, result.toml(heading(result, machine)))
    if args.json:
        print(json.dumps({**result.to_dict(), "file": str(args.out)}, indent=2))
    else:
        print(_text(result, args.out, recipe))
    return 0


def recipe_for_trials(args: argparse.Namespace, command: str) -> Recipe:
    """The recipe that the flags name.

    Raises:
        InputError: no data.
    """
    if args.dataset is None and args.data is None:
        raise InputError(
            f"hotloop {command} needs data", next_step=f"hotloop {command} mnist --model cnn"
        )
    return recipe_from_flags(args)


def present_plan(plan: Plan) -> tuple[Machine, Plan]:
    """This machine, and the plan with ``auto`` replaced by what holds without tuning."""
    from ..machine import Machine

    machine = Machine.probe()
    return machine, plan.resolve(machine, machine.cached_ceilings())


@contextlib.contextmanager
def progress_line(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """One line on stderr that is written over in a terminal; nothing elsewhere or when quiet."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return

    def show(text: str) -> None:
        print(f"\r\x1b[K{text[:150]}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def _line(progress: TuneProgress) -> str:
    return f"{progress.elapsed_s:.0f} of {progress.budget_s:.0f} s  {progress.text}"


def _batch_sizes(args: argparse.Namespace) -> tuple[int, ...]:
    if args.batch_sizes is None:
        return ()
    if args.lr_rule is None:
        raise InputError(
            "--batch-sizes changes what is computed, so the learning rate's rule must be chosen",
            next_step="add --lr-rule linear (SGD), sqrt (Adam) or none",
        )
    try:
        sizes = tuple(int(part) for part in args.batch_sizes.split(",") if part.strip())
    except ValueError:
        raise InputError(
            "--batch-sizes must be whole numbers", got=args.batch_sizes, next_step="write 64,128"
        ) from None
    if not sizes or min(sizes) < 1:
        raise InputError("--batch-sizes must be numbers of at least 1", got=args.batch_sizes)
    return sizes


def _text(result: TuneResult, path: Path, recipe: Recipe) -> str:
    from ..train.tune_result import rate_of
    from ..tuning import text_of

    rows = [("what", "candidate", "samples/s", "times", "outcome")]
    for tried in result.tried:
        rows.append(
            (
                tried.group,
                text_of(tried.candidate),
                format_rate(rate_of(tried), "samples").removesuffix(" samples/s")
                if tried.costs
                else "",
                "" if tried.ratio is None else f"{tried.ratio:.2f}",
                f"{tried.outcome}: {tried.reason}" if tried.reason else tried.outcome,
            )
        )
    parts = [
        f"Tried in {format_seconds(result.elapsed_s)}; times: over the best before it",
        aligned(rows, right=(2, 3)),
        "",
    ]
    if result.lines:
        parts += ["Proof, interleaved in fresh processes: with each against without it"]
        parts += [f"  {text_of(line.knobs)}: {line.text()}" for line in result.lines]
    parts += [f"In all: {result.summary()}", "", f"Written to {path}"]
    if result.batch_size != recipe.batch_size:
        factor = result.learning_rate_factor
        parts += [
            f"The plan was found at batch {result.batch_size}: pass --batch-size "
            f"{result.batch_size} and the learning rate times {factor:g}; results change"
        ]
    if result.remembered:
        parts += ["Remembered: hotloop train with --plan auto uses it for this model and machine"]
    parts += [f"Note: {note}" for note in result.notes]
    return "\n".join(parts)
