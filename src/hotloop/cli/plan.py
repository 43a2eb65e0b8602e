"""``hotloop plan``: the resolved plan and the memory a run will take, before it takes it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..plan import Plan, add_plan_flags, plan_from_flags
from ..units import format_bytes, format_rate
from .recipe import add_recipe_flags, recipe_from_flags
from .text import aligned

if TYPE_CHECKING:
    from ..machine import Machine
    from ..memory import Budget

NAME = "plan"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="the memory a run will take, and the plan for it",
        description="Print the memory table of a run and the resolved plan; nothing is trained.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--phase", choices=("train", "infer"), default="train", help="what the memory is for"
    )
    parser.add_argument("--save", metavar="FILE", help="write the plan as .toml or .json")
    add_recipe_flags(parser)
    add_plan_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print plan and budget; returns the exit code: 2 when the run cannot fit."""
    plan = plan_from_flags(args)
    if args.dataset is None and args.data is None:
        args.dataset = "mnist"
    recipe = recipe_from_flags(args)

    from ..errors import BudgetError
    from ..machine import Machine
    from ..memory import Budget, largest_micro_batch

    machine = Machine.probe()
    resolved = plan.resolve(machine)
    data, test = recipe.open_data(mmap_above_bytes=resolved.memory.mmap_above_bytes)
    model = recipe.build_model()
    options: dict[str, Any] = {
        "data_resident_bytes": data.resident_bytes + (test.resident_bytes if test else 0),
        "machine": machine,
    }
    if args.phase == "train":
        options["loss_fn"] = recipe.build_loss(data)
        options["optimizer"] = recipe.build_optimizer(model)
    example = data.example()
    budget = Budget.predict(model, example, recipe.batch_size, args.phase, resolved, **options)
    limit = resolved.memory_limit_bytes(machine)
    fits = limit is None or budget.total_bytes <= limit
    largest = None
    if limit is not None and not fits and args.phase == "train":
        best = largest_micro_batch(model, example, recipe.batch_size, limit, resolved, **options)
        largest = None if best is None else best[0]
    if args.save:
        resolved.save(args.save)
    if args.json:
        document = {
            "plan": resolved.to_dict(),
            "budget": budget.to_dict(),
            "limit_bytes": limit,
            "fits": fits,
            "largest_micro_batch_size": largest,
        }
        print(json.dumps(document, indent=2))
    else:
        print(_text(machine, resolved, budget, limit))
    if not fits:
        try:
            budget.require_fit(limit, largest)
        except BudgetError as error:
            if args.json:
                return error.exit_code
            raise
    return 0


def _text(machine: Machine, plan: Plan, budget: Budget, limit: int | None) -> str:
    rows = [(title, format_bytes(size)) for title, size in budget.table()]
    title = {"train": "Training", "infer": "Inference"}[budget.phase]
    parts = [
        f"{title} at batch {budget.batch_size}"
        + (f", micro-batch {budget.micro_batch_size}" if _is_cut(budget) else "")
        + ", predicted from shapes",
        aligned(rows, right=(1,)),
        f"Limit: {format_bytes(limit)}",
        *budget.assumptions,
    ]
    if budget.flop_per_step is not None:
        per_sample = format_rate(budget.flop_per_step / budget.batch_size, "FLOP")
        parts.append(f"Arithmetic: {per_sample.removesuffix('/s')} a sample")
    parts += ["", f"Plan for {machine.cpu_model or 'this machine'}"]
    knobs = [
        (f"{part}.{name}", "-" if value is None else str(value))
        for part, values in plan.to_dict().items()
        for name, value in values.items()
    ]
    parts.append(aligned(knobs))
    return "\n".join(parts)


def _is_cut(budget: Budget) -> bool:
    return budget.micro_batch_size < budget.batch_size
