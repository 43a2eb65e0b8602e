"""``hotloop train``: train a model, and leave checkpoints and a report in a folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import InputError
from ..files import write_text_atomically
from ..plan import Plan, add_plan_flags, plan_from_flags
from ..sealed import Sealed, SealingKey, key_file_from_flags, parse_counter, read_key
from .recipe import Recipe, add_recipe_flags, recipe_from_flags
from .watching import add_watch_flags, watching

if TYPE_CHECKING:
    from ..parallel import Hosts
    from ..train import TrainReport

T = TypeVar("T")

NAME = "train"
_RECIPE, _PLAN, _REPORT, _PAGE = "recipe.json", "plan.toml", "report.json", "report.html"
_INTERRUPTED = 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="train a model",
        description="Train a model. Writes checkpoints, report.json and report.html to a folder.",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, without the curve"
    )
    run_group = parser.add_argument_group("run", "where it is kept, and when it ends")
    place = run_group.add_mutually_exclusive_group()
    place.add_argument("--out", metavar="DIR", type=Path, help="folder of this run")
    place.add_argument("--resume", metavar="DIR", type=Path, help="go on with the run in DIR")
    run_group.add_argument(
        "--runs-dir",
        metavar="DIR",
        type=Path,
        default=Path("runs"),
        help="without --out: a new folder below DIR (default: runs)",
    )
    run_group.add_argument(
        "--auto-resume",
        action="store_true",
        help="with --out: go on if a run is there, for schedulers that start a command again",
    )
    run_group.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps in all")
    run_group.add_argument(
        "--fit",
        action="store_true",
        help="where the batch does not fit the memory, take the largest micro-batch that does",
    )
    run_group.add_argument(
        "--no-ceilings",
        dest="ceilings",
        action="store_false",
        help="do not measure what the machine can do (once, about 12 s)",
    )
    key_file_from_flags(run_group)
    run_group.add_argument(
        "--counter",
        metavar="FILE|tpm:INDEX",
        help="with --key-file: refuse checkpoints older than this counter says",
    )
    run_group.add_argument("--quiet", action="store_true", help="no progress")
    add_watch_flags(parser)
    add_recipe_flags(parser)
    add_plan_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code. Of several hosts, host 0 alone writes and prints."""
    plan = plan_from_flags(args)
    if args.counter is not None and args.key_file is None:
        raise InputError("--counter is for sealed checkpoints", next_step="pass --key-file")
    key = None if args.key_file is None else read_key(args.key_file)
    if args.auto_resume and args.out is None:
        raise InputError("--auto-resume needs the folder of the run", next_step="pass --out DIR")
    if args.resume is None and args.dataset is None and args.data is None:
        raise InputError("hotloop train needs data", next_step="hotloop train mnist")
    with _hosts(plan) as hosts:
        if args.resume is not None:
            recipe = _on_first(hosts, lambda: Recipe.load(args.resume / _RECIPE))
            return _train(args, args.resume, recipe, plan, hosts, key, resume=True)
        recipe = recipe_from_flags(args)
        folder: Path = args.out or _new_folder(args.runs_dir, recipe)
        if args.auto_resume and _on_first(hosts, lambda: _has_begun(folder, recipe)):
            return _train(args, folder, recipe, plan, hosts, key, resume=True)
        new = _on_first(hosts, lambda: _make(folder))
        try:
            return _train(args, folder, recipe, plan, hosts, key, resume=False)
        except InputError:
            if _is_first(hosts):
                _unmake(folder, new)
            raise


@contextlib.contextmanager
def _hosts(plan: Plan) -> Iterator[Hosts | None]:
    """The hosts of ``torchrun``, joined for the whole command; alone, torch is not needed yet."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    import torch

    from ..parallel import joined

    with joined(plan.parallel.host_timeout_s, torch.device("cpu")) as hosts:
        yield hosts


def _is_first(hosts: Hosts | None) -> bool:
    return hosts is None or hosts.rank == 0


def _on_first(hosts: Hosts | None, make: Callable[[], T]) -> T:
    """What host 0 makes, on all of them."""
    return make() if hosts is None else hosts.first(make)


def _has_begun(folder: Path, recipe: Recipe) -> bool:
    """Whether this run is in ``folder`` already.

    Raises:
        InputError: another run is.
    """
    if not (folder / _RECIPE).exists():
        return False
    found = Recipe.load(folder / _RECIPE)
    if found != recipe:
        names = [f.name for f in dataclasses.fields(Recipe)]
        other = [n for n in names if getattr(found, n) != getattr(recipe, n)]
        raise InputError(
            f"--auto-resume must find the same run in {folder}",
            got=f"another {', '.join(other)}",
            next_step="choose another folder, or go on with the run there with --resume",
        )
    return True


def _train(
    args: argparse.Namespace,
    folder: Path,
    recipe: Recipe,
    plan: Plan,
    hosts: Hosts | None,
    key: SealingKey | None,
    *,
    resume: bool,
) -> int:
    from ..measure import Machine
    from ..report import render_page
    from ..report.document import Document
    from ..train import Trainer
    from .progress_bar import progress_bar
    from .report_text import print_report

    machine = Machine.probe()
    first = _is_first(hosts)

    def say(text: str) -> None:
        if first and not args.quiet:
            print(text, file=sys.stderr)

    train, test = recipe.open_data(mmap_above_bytes=plan.memory.mmap_above_bytes, key=key)
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, train.num_samples)
    ceilings = None
    if args.ceilings and hosts is not None:
        ceilings = machine.cached_ceilings()  # Processes that share a machine would disturb it.
    elif args.ceilings:
        if machine.cached_ceilings() is None:
            say("hotloop: measuring what this machine can do (once, about 12 s)")
        ceilings = machine.ceilings()
    trainer = Trainer(
        model,
        recipe.build_loss(train),
        optimizer,
        plan,
        scheduler=scheduler,
        scheduler_interval="step",
        ceilings=ceilings,
        machine=machine,
    )
    say(f"hotloop: {train.description}, batch {recipe.batch_size}, in {folder}")
    if first:
        recipe.save(folder / _RECIPE)
        plan.save(folder / _PLAN)
    looks = watching(args, machine, say) if first else contextlib.nullcontext((None, None))
    with (
        looks as (monitor, drawn),
        progress_bar(quiet=args.quiet or drawn is not None or not first) as bar,
    ):
        report = trainer.fit(
            train,
            recipe.batch_size,
            recipe.epochs,
            validation=test,
            seed=recipe.seed,
            target_accuracy=recipe.target_accuracy,
            max_steps=args.max_steps,
            checkpoint_dir=_checkpoints(folder, key, args.counter),
            resume=resume,
            fit_memory=args.fit,
            on_progress=drawn or bar,
            monitor=monitor or False,
        )
    code = _INTERRUPTED if report.stopped == "interrupted" else 0
    if not first:
        return code
    report.save(folder / _REPORT)
    write_text_atomically(folder / _PAGE, render_page(report.to_dict()))
    if args.json:
        print(json.dumps(_json(report, folder), indent=2))
    else:
        document = Document(report.to_dict())
        print_report(document, document.at("machine"), _files(report, folder))
    return code


def _checkpoints(folder: Path, key: SealingKey | None, counter: str | None) -> Path | Sealed:
    path = folder / "checkpoints"
    if key is None:
        return path
    return Sealed(path, key, counter=None if counter is None else parse_counter(counter))


def _files(report: TrainReport, folder: Path) -> list[tuple[str, str]]:
    rows = [("report", str(folder / _REPORT)), ("as a page", str(folder / _PAGE))]
    if report.checkpoint is not None:
        rows.append(("checkpoint", report.checkpoint))
    return rows


def _json(report: TrainReport, folder: Path) -> dict[str, Any]:
    document = report.to_dict()
    del document["curve"]
    document["folder"] = str(folder)
    document["page"] = str(folder / _PAGE)
    return document


def _new_folder(runs_dir: Path, recipe: Recipe) -> Path:
    """A name not taken, from data, model and time."""
    source = recipe.dataset if recipe.dataset == "mnist" else Path(recipe.data or "").stem
    model = recipe.model.replace(":", "-").replace(".", "-")
    name = f"{source}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (name if i == 0 else f"{name}-{i}" for i in range(1000))
    return next(runs_dir / c for c in candidates if not (runs_dir / c).exists())


def _make(folder: Path) -> list[Path]:
    """Make the folder of a run before the work; gives the folders that are new.

    Raises:
        InputError: it cannot be made or written to.
    """
    new: list[Path] = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        new.append(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"the folder of the run, {folder}, must be writable",
            got=error.strerror,
            next_step="choose another with --out",
        ) from error
    return new


def _unmake(folder: Path, new: list[Path]) -> None:
    """A run that is refused leaves nothing behind."""
    if new:
        for name in (_RECIPE, _PLAN):
            (folder / name).unlink(missing_ok=True)
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()  # only if empty
