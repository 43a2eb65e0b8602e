"""``hotloop bench``: its kinds, and the races of training, ``train`` and ``scale``, on MNIST."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench_infer, bench_load
from .bench_options import chosen, live_line, positive, write_document
from .kinds import add_common_options

if TYPE_CHECKING:
    from ..bench import Race

NAME = "bench"
_MODELS = ("small", "big", "cnn", "large")
# Figures of the performance guide for a Ryzen 9 5950X: samples, seconds an epoch, GB.
_GUIDE = ((10_000, 45, 0.8), (50_000, 210, 1.2), (100_000, 425, 1.5))


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="race hotloop against its peers, in training and in inference; put load on a server",
        description="Race hotloop against its peers, each in a process of its own, in turn.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for what, text in (
        ("train", "train with each peer, epoch by epoch, on the same batches"),
        ("scale", "training on 1, 2, ... workers, and DistributedDataParallel"),
    ):
        _add_training(kinds.add_parser(what, help=text, description=text.capitalize() + "."))
    bench_infer.add_parser(kinds)
    bench_load.add_parser(kinds)
    add_common_options(kinds)
    for kind in kinds.choices.values():
        kind.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="small,big,cnn", metavar="A,B", help="models")
    parser.add_argument("--peers", metavar="A,B", help="peers; default: all")
    parser.add_argument("--num-samples", type=int, default=10_000, metavar="N")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured epochs each")
    parser.add_argument("--num-threads", type=int, metavar="N", help="of each peer; default: all")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bfloat16", "auto"), help="of hotloop"
    )
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="hotloop data-parallel on N workers"
    )
    parser.add_argument(
        "--guide", action="store_true", help="the guide's table: hotloop at three sizes"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Race and print.

    Raises:
        InputError: an unknown model or peer, or a number below 1.
    """
    models = chosen("--models", args.models, _MODELS)
    positive(args, "num_samples", "batch_size", "rounds", "num_threads", "num_workers")
    from ..bench import race_training
    from ..bench.peers import PEERS

    known = ["hotloop", *PEERS]
    if args.what == "scale":
        known = _scale_peers(args.num_threads)
    peers = chosen("--peers", args.peers, known)
    sizes = [n for n, _, _ in _GUIDE] if args.guide else [args.num_samples]
    if args.guide:
        peers = ["hotloop"]
    races = [
        race_training(
            model, peers, num_samples=size, batch_size=args.batch_size, rounds=args.rounds,
            threads=args.num_threads, precision=args.precision, workers=args.num_workers,
            say=live_line,
        )
        for model in models
        for size in sizes
    ]  # fmt: skip
    if args.what == "scale":
        return _scale(args, races)
    if write_document(args, [race.to_dict() for race in races]):
        return 0
    if args.guide:
        _print_guide(races)
    else:
        for race in races:
            _print(race)
    return 0


def _scale_peers(num_threads: int | None) -> list[str]:
    """One step with all threads; 1, 2, 4, ... workers; DistributedDataParallel with as many."""
    from ..machine import Machine

    most = num_threads or Machine.probe().usable_cpus
    counts = sorted({most, *(2**n for n in range(most.bit_length()) if 2**n <= most)})
    return ["hotloop", *(f"workers-{n}" for n in counts), *(f"ddp-{n}" for n in counts if n > 1)]


def _scale(args: argparse.Namespace, races: list[Race]) -> int:
    from ..bench.scale import measure_costs, predictions, scale_rows

    documents = []
    for race in races:
        costs = measure_costs(race.model, race.batch_size)
        documents.append(
            {
                **race.to_dict(),
                "scale": scale_rows(race, costs),
                "costs": dataclasses.asdict(costs),
                "predictions": predictions(costs, (64, 256)),
            }
        )
    if write_document(args, documents):
        return 0
    for race, document in zip(races, documents, strict=True):
        _print(race)
        _print_scale(document)
    return 0


def _print_scale(document: dict[str, Any]) -> None:
    from .text import aligned

    rows = [("", "samples/s", "efficiency", "predicted")]
    for row in document["scale"]:
        efficiency, predicted = row["efficiency"], row["predicted_per_s"]
        rows.append(
            (
                row["peer"],
                f"{row['samples_per_s']:,.0f}",
                "" if efficiency is None else f"{efficiency:.0%}",
                "" if predicted is None else f"{predicted:,.0f}",
            )
        )
    for row in document["predictions"]:
        title = f"{row['num_workers']} workers, batch {row['batch_size']:,}, simulated"
        rows.append((title, "", f"{row['efficiency']:.0%}", f"{row['samples_per_s']:,.0f}"))
    print(aligned(rows, right=(1, 2, 3)) + "\n")


def _print(race: Race) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..bench.result import COLUMNS

    table = Table(
        title=f"{race.model}: {race.num_samples:,} samples, batch {race.batch_size}, "
        f"{race.threads} threads",
        title_justify="left",
    )
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in race.rows():
        table.add_row(*row)
    console = Console(width=130)
    console.print(table)
    for line in race.chart():
        console.print(line, highlight=False)
    if race.floor_s is not None and race.sum_floor_s is not None:
        print(
            f"floor: {race.num_samples / race.floor_s:,.0f} samples/s (arithmetic or the update's "
            f"traffic alone), {race.num_samples / race.sum_floor_s:,.0f} (one after the other)\n"
        )


def _print_guide(races: list[Race]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Training, batch 64: hotloop beside the guide", title_justify="left")
    for column in ("model", "samples", "s/epoch", "guide s", "MiB", "guide GB"):
        table.add_column(column, justify="right")
    guide = {n: (s, gb) for n, s, gb in _GUIDE}
    for race in races:
        (timing,) = race.timings
        seconds, gigabytes = guide[race.num_samples]
        table.add_row(
            race.model,
            f"{race.num_samples:,}",
            f"{timing.median_s:.2f}" if timing.seconds else timing.missing or "",
            f"{seconds}",
            f"{(timing.peak_bytes or 0) / 2**20:,.0f}",
            f"{gigabytes}",
        )
    Console(width=110).print(table)
