"""What shall run in an enclave: a model, a run, an export, or a command; and what it needs."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .compiler_on_demand import import_compiler_on_demand
from .recipe import ZOO, Recipe, recipe_from_flags

if TYPE_CHECKING:
    from ..enclave.needs import Needs
    from ..plan import Plan

COMMANDS = ("train", "serve")
_RECIPE, _PLAN, _EXPORT = "recipe.json", "plan.toml", "model.json"


@dataclasses.dataclass(frozen=True)
class Target:
    """What shall run.

    Attributes:
        needs: at the batch that was asked for.
        at: needs at another size: the micro-batch in training, the batch in inference.
    """

    needs: Needs
    at: Callable[[int], Needs]


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what runs inside."""
    parser.add_argument(
        "target", nargs="+", metavar="TARGET",
        help="cnn, small, big or module:factory; the folder of a run or of an export; or, after "
        "--, a command: train ... or serve ...",
    )  # fmt: skip
    parser.add_argument("--phase", choices=("train", "infer"), help="default: infer for an export")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: 64, or the run's")
    parser.add_argument("--data", metavar="PATH", help="of a model by name, as in hotloop train")


def read_target(args: argparse.Namespace) -> Target:
    """What ``args.target`` needs.

    Raises:
        InputError: it is no model, run, export or command, or cannot be used.
    """
    words: list[str] = args.target
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError("--batch-size must be at least 1", got=args.batch_size)
    if words[0] in COMMANDS:
        return _command(args, words)
    if len(words) > 1:
        raise InputError(
            "an enclave has one target", got=" ".join(words), next_step="put -- before a command"
        )
    folder = Path(words[0])
    if (folder / _EXPORT).is_file():
        if args.phase == "train":
            raise InputError("an export only answers", next_step="use --phase infer")
        return _export(folder, args.batch_size or 64)
    from ..plan import Plan

    if (folder / _RECIPE).is_file():
        recipe = Recipe.load(folder / _RECIPE)
        plan = Plan.load(folder / _PLAN) if (folder / _PLAN).is_file() else Plan()
    elif folder.exists():
        raise InputError(
            "a folder must be a run (recipe.json) or an export (model.json)", got=folder
        )
    else:
        recipe, plan = _recipe_of_model(words[0], args.data), Plan()
    if args.batch_size is not None:
        recipe = dataclasses.replace(recipe, batch_size=args.batch_size)
    return _model(recipe, plan, args.phase or "train", with_data=args.data is not None)


def _recipe_of_model(name: str, data: str | None) -> Recipe:
    if name in ZOO:
        return Recipe(model=name, data=data, download=False)
    if data is None:
        raise InputError("a model of your own needs data to be sized", next_step="pass --data FILE")
    return Recipe(dataset="file", model=name, data=data)


def _command(args: argparse.Namespace, words: list[str]) -> Target:
    parser = argparse.ArgumentParser(prog="hotloop", allow_abbrev=False)
    module = importlib.import_module(f".{words[0]}", __package__)
    module.add_parser(parser.add_subparsers(dest="command", required=True))
    inner = parser.parse_args(words)
    if words[0] == "serve":
        return _export(Path(inner.model), args.batch_size or 64, ("hotloop.serve",))
    from ..plan import plan_from_flags

    plan = plan_from_flags(inner)
    if inner.resume is not None:
        return _model(Recipe.load(inner.resume / _RECIPE), plan, "train", with_data=True)
    if inner.dataset is None and inner.data is None:
        raise InputError("hotloop train needs data", next_step="train mnist --data DIR")
    return _model(recipe_from_flags(inner), plan, "train", with_data=True)


def _export(folder: Path, batch_size: int, modules: tuple[str, ...] = ()) -> Target:
    from ..enclave.needs import export_needs

    if not (folder / _EXPORT).is_file():
        raise InputError("the export must be there", got=folder, next_step="hotloop export MODEL")
    return Target(
        export_needs(folder, batch_size, modules), lambda size: export_needs(folder, size, modules)
    )


def _model(recipe: Recipe, plan: Plan, phase: str, *, with_data: bool) -> Target:
    if "torch" not in sys.modules:  # As hotloop train does, whose memory this is.
        import_compiler_on_demand()
    from ..enclave.needs import model_needs
    from ..machine import Machine

    machine = Machine.probe()
    resolved = plan.resolve(machine)
    model = recipe.build_model()
    options: dict[str, Any] = {"machine": machine}
    notes: tuple[str, ...] = ()
    if with_data:
        data, test = recipe.open_data(mmap_above_bytes=resolved.memory.mmap_above_bytes)
        example = data.example()
        if phase == "train":
            resident = data.resident_bytes + (test.resident_bytes if test else 0)
            options["data_resident_bytes"] = resident
            options["loss_fn"] = recipe.build_loss(data)
    else:
        import torch

        example = (torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64))
        notes = ("the samples themselves are not counted: pass --data",)
    if phase == "train":
        options["optimizer"] = recipe.build_optimizer(model)

    def at(size: int) -> Needs:
        batch, tried = recipe.batch_size, resolved
        if phase == "train":
            tried = resolved.replace({"memory.micro_batch_size": size})
        else:
            batch = size
        needs = model_needs(model, example, batch, phase, tried, **options)
        return dataclasses.replace(needs, assumptions=(*needs.assumptions, *notes))

    first = min(resolved.memory.micro_batch_size or recipe.batch_size, recipe.batch_size)
    return Target(at(first), at)
