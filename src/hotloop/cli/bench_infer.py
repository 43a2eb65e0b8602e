"""``hotloop bench infer``: engines side by side on the same batches, and the guide's table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import InputError
from .bench_options import chosen, live_line, positive, write_document

if TYPE_CHECKING:
    from ..bench.infer_result import InferRace

WHAT = "infer"


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind to ``hotloop bench``."""
    parser = kinds.add_parser(
        WHAT,
        help="answer the same batches with each engine",
        description="Answer the same batches with hotloop and its peers, a stretch of time a turn, "
        "after comparing each one's outputs with eager PyTorch's.",
    )
    parser.add_argument("--models", metavar="A,B", help="models; default: all")
    parser.add_argument("--batch-sizes", default="1,32,64", metavar="A,B", help="samples a call")
    parser.add_argument("--peers", metavar="A,B", help="peers; default: all")
    parser.add_argument(
        "--goal", default="auto", choices=("auto", "latency", "throughput"),
        help="one call at a time, or as many as a peer likes (auto: the first for batch 1)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of each (7)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="of each turn (0.5)"
    )
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPUs of each; default: all")
    parser.add_argument(
        "--max-accuracy-loss", type=float, metavar="X",
        help="let hotloop compute in bfloat16 or int8: models are trained on MNIST for an epoch "
        "first, and the accuracy on its test digits is told",
    )  # fmt: skip
    parser.add_argument(
        "--guide", action="store_true", help="the guide's table: hotloop beside its figures"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Race and print.

    Raises:
        InputError: an unknown model or peer, or a number outside its rule.
    """
    from ..bench.shapes import MNIST_MODELS, SAMPLE_SHAPES

    lossy = args.max_accuracy_loss is not None
    known_models = MNIST_MODELS if lossy or args.guide else tuple(SAMPLE_SHAPES)
    models = chosen("--models", args.models, known_models)
    sizes = _sizes(args.batch_sizes)
    positive(args, "rounds", "seconds", "num_threads")
    if lossy and not 0 <= args.max_accuracy_loss < 1:
        raise InputError(
            "--max-accuracy-loss is a share, at least 0 and below 1", got=args.max_accuracy_loss,
            next_step="--max-accuracy-loss 0.002",
        )  # fmt: skip
    from ..bench.infer import race_inference, train_on_mnist
    from ..bench.infer_peers import PEERS
    from ..bench.infer_result import HOTLOOP

    known = [*HOTLOOP] if args.guide else [*PEERS]
    peers = chosen("--peers", args.peers, known)
    races = []
    for model in models:
        trained = train_on_mnist(model, say=live_line) if lossy else None
        races += [
            race_inference(
                model, peers, batch_size=size, goal=args.goal, rounds=args.rounds,
                seconds=args.seconds, threads=args.num_threads,
                max_accuracy_loss=args.max_accuracy_loss, trained=trained, say=live_line,
            )
            for size in sizes
        ]  # fmt: skip
    live_line("")
    if write_document(args, [race.to_dict() for race in races]):
        return 0
    if args.guide:
        _print_guide(races)
        return 0
    for race in races:
        _print(race)
    _print_ratios(races)
    return 0


def _sizes(text: str) -> list[int]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if not all(0 < size <= 65536 for size in sizes):
        raise InputError(
            "--batch-sizes are numbers from 1 to 65536", got=text, next_step="--batch-sizes 1,32,64"
        )
    return sizes


def _print(race: InferRace) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..bench.infer_result import COLUMNS

    shape = "x".join(map(str, race.sample_shape))
    goal = "one call at a time" if race.goal == "latency" else "as many calls as a peer likes"
    allowed = "float32"
    if race.max_accuracy_loss is not None:
        allowed = f"hotloop may lose {race.max_accuracy_loss} of eager's {race.eager_accuracy:.2%}"
    table = Table(
        title=f"{race.model} {shape}, batch {race.batch_size}, {race.threads} CPUs, {goal}, "
        f"{allowed}: samples/s",
        title_justify="left",
    )
    rows = race.rows()
    # A column that has nothing to say is left out.
    shown = [i for i, _ in enumerate(COLUMNS) if i < 2 or any(row[i] for row in rows)]
    for number in shown:
        table.add_column(COLUMNS[number], justify="left" if number in (0, 11) else "right")
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    Console(width=160).print(table)


def _print_ratios(races: list[InferRace]) -> None:
    """hotloop over the fastest peer of each race, in one table."""
    from .text import aligned

    rows = [("model", "batch", "hotloop over the fastest peer", "rounds", "fastest peer")]
    for race in races:
        mine = next((t for t in race.ran() if t.peer == "hotloop"), None)
        other = race.fastest_peer()
        if mine is None or other is None:
            continue
        ratios = race.ratios(mine)
        rows.append(
            (
                race.model, str(race.batch_size), f"{mine.median_per_s / other.median_per_s:.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}", other.peer,
            )
        )  # fmt: skip
    if len(rows) > 1:
        print(aligned(rows, right=(1, 2, 3)))


def _print_guide(races: list[InferRace]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..bench.infer_result import GUIDE

    table = Table(title="Inference: hotloop beside the guide", title_justify="left")
    for column in (
        "model", "batch", "how", "samples/s", "guide samples/s", "resident MiB", "guide GB"
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "how") else "right")
    guide = {size: (rate, gigabytes) for size, rate, gigabytes in GUIDE}
    for race in races:
        rate, gigabytes = guide.get(race.batch_size, (None, None))
        for timing in race.timings:
            ran = bool(timing.samples_per_s)
            table.add_row(
                race.model,
                str(race.batch_size),
                timing.peer,
                f"{timing.median_per_s:,.0f}" if ran else timing.missing or "",
                "" if rate is None else f"{rate:,}",
                f"{timing.resident_bytes / 2**20:,.0f}" if timing.resident_bytes else "",
                "" if gigabytes is None else str(gigabytes),
            )
    Console(width=110).print(table)
