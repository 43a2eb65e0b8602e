"""``hotloop prove``: a change of the plan against the present plan, in turn, with an interval."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, PlanError
from ..plan import AUTO, Plan, add_plan_flags, flags, plan_from_flags
from ..units import format_rate
from .recipe import Recipe, add_recipe_flags, trial_source
from .tune import present_plan, progress_line, recipe_for_trials

if TYPE_CHECKING:
    from ..monitor.optimization import Optimization
    from ..train.proof import Proven

NAME = "prove"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="prove or refute that a change makes training faster",
        description="Train with and without a change of the plan, in turn, each in a fresh process "
        "on your model and data, until the answer is clear. Exit code 0 when it was measured, "
        "whatever the answer.",
    )
    group = parser.add_argument_group("change", "what is to be proven")
    group.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", dest="changes",
        help="a knob of the changed plan, such as parallel.num_workers=2; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--from", type=Path, metavar="REPORT", dest="report",
        help="a report.json of hotloop train: one of its suggestions, on its recipe and plan",
    )  # fmt: skip
    group.add_argument("--name", help="of the suggestion (default: the first that can be proven)")
    group.add_argument(
        "--save", action="store_true",
        help="with --from: write the proof into the report, for hotloop report to show",
    )  # fmt: skip
    group.add_argument(
        "--budget-s", type=float, default=60.0, metavar="S",
        help="seconds of measuring at most (default: 60)",
    )  # fmt: skip
    group.add_argument(
        "--confidence", type=float, default=0.95, metavar="X", help="of the interval (0.95)"
    )
    group.add_argument(
        "--margin", type=float, default=0.02, metavar="X",
        help="ratios this near to 1 are no difference (default: 0.02)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_recipe_flags(parser)
    add_plan_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    if not args.budget_s > 0:
        raise InputError("--budget-s must be above 0", got=args.budget_s)
    if not 0 < args.confidence < 1:
        raise InputError("--confidence must be above 0 and below 1", got=args.confidence)
    if not args.margin >= 0:
        raise InputError("--margin must be at least 0", got=args.margin)
    if bool(args.changes) == (args.report is not None):
        raise InputError(
            "hotloop prove needs a change",
            next_step="--set parallel.num_workers=2, or --from report.json",
        )
    if args.save and args.report is None:
        raise InputError("--save writes into a report", next_step="name it with --from report.json")
    suggestion: Optimization | None = None
    plan = plan_from_flags(args)
    if args.report is not None:
        suggestion, recipe, plan = _from_report(args, plan)
        assert suggestion.change.plan is not None
        change: dict[str, Any] = dict(suggestion.change.plan)
    else:
        change = _knobs(args.changes)
        recipe = recipe_for_trials(args, NAME)
    machine, present = present_plan(plan)
    if present.replace(change).cpu.num_threads == AUTO:
        raise PlanError("a change must name a number of threads", got=AUTO)
    from ..train.proof import prove
    from ..train.trials import PlanTrials

    with progress_line(quiet=args.quiet) as show:

        def on_pair(count: int, ratio: float, low: float, high: float) -> None:
            bounds = f"{low:.3f} to {high:.3f}" if math.isfinite(high) else "too early to tell"
            show(f"{count} pairs: {ratio:.3f} times ({bounds})")

        source = trial_source(recipe)
        with PlanTrials(source, present, on_start=lambda what: show(f"starting {what}")) as trials:
            proven = prove(
                trials,
                change,
                budget_s=args.budget_s,
                confidence=args.confidence,
                margin=args.margin,
                on_pair=on_pair,
            )
    if args.save and suggestion is not None:
        _save(args.report, suggestion, proven.applied_to(suggestion))
    if args.json:
        document = {
            **proven.to_dict(),
            "proof": proven.proof().to_dict(),
            "present": present.to_dict(),
            "machine": machine.fingerprint(),
        }
        if suggestion is not None:
            document["optimization"] = proven.applied_to(suggestion).to_dict()
        print(json.dumps(document, indent=2))
    else:
        print(_text(proven, suggestion))
    return 0


def _knobs(pairs: list[str]) -> dict[str, Any]:
    """Knobs from ``part.name=value``, read as their flags are; ``none`` where one may be unset."""
    from ..tuning import knobs_of

    known = {name: metadata for _, name, metadata in flags()}
    default = knobs_of(Plan())
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or "." not in name:
            raise PlanError(
                "--set takes part.knob=value", got=pair, next_step="--set parallel.num_workers=2"
            )
        if name not in known:
            Plan().replace({name: None})  # Raises, with the nearest name.
        if text == "none" and default[name] is None:
            values[name] = None
            continue
        try:
            values[name] = known[name]["parse"](text)
        except ValueError as error:
            raise PlanError(
                f"--set {name}: {getattr(error, 'rule', error)}", got=repr(text)
            ) from None
    plain = knobs_of(Plan().replace(values))
    return {name: plain[name] for name in values}


def _from_report(args: argparse.Namespace, plan: Plan) -> tuple[Optimization, Recipe, Plan]:
    """A suggestion of a report, and the recipe and the plan of its run unless others are named."""
    from ..monitor.optimization import Optimization

    path: Path = args.report
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = [Optimization.from_dict(entry) for entry in document.get("optimizations") or []]
        run_plan = Plan.from_dict(document["plan"]) if "plan" in document else plan
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} must be a report of hotloop train", got=f"{type(error).__name__}: {error}",
            next_step="name the report.json in the folder of a run",
        ) from None  # fmt: skip
    suggestion = _chosen(found, args.name, path)
    named = args.dataset is not None or args.data is not None
    recipe = recipe_for_trials(args, NAME) if named else Recipe.load(path.parent / "recipe.json")
    return suggestion, recipe, run_plan if args.plan == AUTO else plan


def _save(path: Path, suggestion: Optimization, proven: Optimization) -> None:
    """Put the suggestion as it is now in the place of the one it was; the rest stays as it is.

    Raises:
        StorageError: the report cannot be written.
    """
    from ..files import write_text_atomically
    from ..monitor.optimization import Optimization

    document = json.loads(path.read_text(encoding="utf-8"))
    found = [Optimization.from_dict(entry) for entry in document["optimizations"]]
    document["optimizations"][found.index(suggestion)] = proven.to_dict()
    write_text_atomically(path, json.dumps(document, indent=2) + "\n")


def _chosen(found: list[Optimization], name: str | None, path: Path) -> Optimization:
    """The suggestion of this name, else the first whose change is one of the plan."""
    named = [s for s in found if s.name == name] if name is not None else found
    if not named:
        raise InputError(
            f"{path} must have the suggestion",
            got=name or "no suggestions",
            next_step=f"name one of {', '.join(s.name for s in found)}" if found else None,
        )
    for suggestion in named:
        if suggestion.change.plan:
            return suggestion
    command = next((s.change.command for s in named if s.change.command), None)
    raise InputError(
        "a suggestion can be proven here where its change is one of the plan",
        got=named[0].name,
        next_step=command or "name another",
    )


def _text(proven: Proven, suggestion: Optimization | None) -> str:
    found = proven.comparison
    change = ", ".join(
        f"{name} = {'none' if value is None else value}" for name, value in proven.change.items()
    )
    why = {
        "clear": "the interval is clear of 1",
        "within the margin": "the interval is within the margin: no difference that matters",
        "time": "the time was spent before it was clear",
        "pairs": "as many pairs as it makes at most",
    }[found.stopped]

    def rates(seconds: tuple[float, float, float]) -> str:
        low, middle, high = (1 / s for s in reversed(seconds))
        return f"{format_rate(middle, 'samples')} ({low:,.0f} to {high:,.0f})"

    lines = [] if suggestion is None else [f"{suggestion.name}: {suggestion.title}"]
    return "\n".join(
        [
            *lines,
            f"{found.verdict}: {change}",
            f"  speed     {found.text()} the present plan; always-valid interval",
            f"  without   {rates(found.a_s)}",
            f"  with      {rates(found.b_s)}",
            f"  results   {proven.numerics}",
            f"  stopped   {why}",
        ]
    )
