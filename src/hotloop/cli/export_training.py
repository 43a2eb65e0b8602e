"""``hotloop export --training``: a training run to a folder that needs no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .recipe import LEARNING_RATES, LOSSES, SCHEDULES, Recipe, trained_model

if TYPE_CHECKING:
    from torch import nn


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is trained; those of ``hotloop train``."""
    default = Recipe()
    group = parser.add_argument_group(
        "training", "with --training: what is trained; the folder of a run has its own"
    )
    group.add_argument(
        "--training", action="store_true",
        help="write a training run for hotloop enclave train, which needs no torch",
    )  # fmt: skip
    group.add_argument(
        "--data", metavar="DATA", default="mnist",
        help="mnist, an .npz file or an IDX folder: its shapes and number of samples count",
    )  # fmt: skip
    group.add_argument("--loss", choices=LOSSES, default=default.loss)
    group.add_argument("--optimizer", choices=tuple(LEARNING_RATES), default=default.optimizer)
    group.add_argument("--learning-rate", "--lr", type=float, metavar="X")
    group.add_argument("--weight-decay", type=float, default=default.weight_decay, metavar="X")
    group.add_argument("--momentum", type=float, default=default.momentum, metavar="X")
    group.add_argument("--schedule", choices=SCHEDULES, default=default.schedule)
    group.add_argument(
        "--epochs", type=int, default=default.epochs, metavar="N", help="that a schedule is for"
    )
    group.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N")
    group.add_argument(
        "--seed", type=int, default=default.seed, metavar="N", help="of the first weights"
    )
    group.add_argument("--threads", type=int, metavar="N", help="inside each kernel")


def run(args: argparse.Namespace, out: Path) -> int:
    """Record, write and print; returns the exit code."""
    from ..data.transforms import Normalize
    from ..enclave.training import export_training, load_training

    recipe, model = _recipe(args)
    data = recipe.open_training_data(mmap_above_bytes=0)
    if len(data.transforms) > 1 or any(type(t) is not Normalize for t in data.transforms):
        raise InputError(
            "a training export normalizes and augments no more", got=recipe.augment,
            next_step="export without --augment",
        )  # fmt: skip
    if data.num_samples < recipe.batch_size:
        raise InputError(
            "the data must fill one batch", got=f"{data.num_samples} samples",
            next_step="pass a smaller --batch-size",
        )  # fmt: skip
    example = _example(data, recipe.batch_size)
    optimizer = recipe.build_optimizer(model)
    steps = recipe.epochs * -(-data.num_samples // recipe.batch_size)
    scheduler = recipe.build_scheduler(optimizer, data.num_samples)
    notes = export_training(
        model,
        recipe.build_loss(data),
        optimizer,
        example,
        out,
        num_samples=data.num_samples,
        normalize=_terms(data.transforms[0]) if data.transforms else None,
        scheduler=scheduler,
        scheduler_interval="step",
        schedule_length=steps if scheduler is not None else 0,
        num_threads=args.threads,
    )
    made = load_training(out)
    sizes = ", ".join(map(str, made.batch_sizes))
    if args.json:
        document = {"out": str(out), "batch_sizes": made.batch_sizes, "notes": notes,
                    "memory_bytes": made.memory_bytes}  # fmt: skip
        print(json.dumps(document, indent=2))
        return 0
    for note in notes:
        print(f"note    {note}")
    print(f"batches of {sizes}; weights, states and arena take {made.memory_bytes / 2**20:.1f} MiB")
    print(f"wrote   {out}; train it with hotloop enclave train {out} --data {args.data}")
    return 0


def _recipe(args: argparse.Namespace) -> tuple[Recipe, nn.Module]:
    """What is trained, and the model with its weights."""
    if Path(args.model).is_dir():
        return trained_model(Path(args.model))
    names = {f.name for f in dataclasses.fields(Recipe)} - {"dataset", "data", "samples"}
    values: dict[str, Any] = {n: v for n, v in vars(args).items() if n in names}
    dataset: dict[str, Any] = {"dataset": "mnist"}
    if args.data != "mnist":
        dataset = {"dataset": "file", "data": args.data}
    recipe = Recipe(**values, **dataset)
    model = recipe.build_model()
    if args.weights is not None:
        from ..infer.files import load_weights

        load_weights(model, args.weights)
    model.train()
    return recipe, model


def _example(data: Any, count: int) -> tuple[Any, Any]:
    import torch

    x = torch.empty((count, *data.sample_shape), dtype=data.sample_dtype)
    y = torch.empty((count, *data.target_shape), dtype=data.target_dtype)
    data.gather(torch.arange(count), x, y)
    return x, y


def _terms(normalize: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    def several(value: Any) -> tuple[float, ...]:
        return tuple(value) if isinstance(value, tuple) else (float(value),)

    return several(normalize.mean), several(normalize.std)
