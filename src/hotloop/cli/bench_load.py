"""``hotloop bench load URL``: load on a server at a chosen rate, and how long each answer took."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .bench_options import live_line, positive, write_document

if TYPE_CHECKING:
    from ..bench.load import LoadReport

WHAT = "load"
_FORMATS = ("binary", "json", "predict")


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the kind to ``hotloop bench``."""
    parser = kinds.add_parser(
        WHAT,
        help="put load on a server at a chosen rate",
        description="Send requests at times drawn beforehand, whatever the answers do, and count "
        "each latency from the time its request fell due.",
    )
    parser.add_argument(
        "url", metavar="URL",
        help="http://HOST:PORT of hotloop serve, or http://HOST:PORT/v2/models/NAME of any server "
        "of the Open Inference Protocol; with --body, where it is posted to",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=float, default=100.0, metavar="R", help="requests a second (100)"
    )
    parser.add_argument(
        "--duration-s", type=float, default=10.0, metavar="S", help="of sending (10)"
    )
    parser.add_argument(
        "--arrivals", default="poisson", choices=("poisson", "fixed"),
        help="as many independent clients, or evenly",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="samples a request (1)")
    parser.add_argument(
        "--format", default="binary", choices=_FORMATS,
        help="tensors as bytes, as JSON, or the plain JSON of /predict",
    )  # fmt: skip
    parser.add_argument("--body", type=Path, metavar="FILE", help="send this instead")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="first line: token to send")
    parser.add_argument(
        "--max-connections", type=int, default=1000, metavar="N", help="at most open (1000)"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=10.0, metavar="S",
        help="after which a request counts as unanswered (10)",
    )  # fmt: skip
    parser.add_argument(
        "--ramp", action="store_true",
        help="raise the rate from --rate until the server does not keep up: its capacity",
    )  # fmt: skip
    parser.add_argument("--factor", type=float, default=1.25, metavar="X", help="a step (1.25)")
    parser.add_argument("--max-steps", type=int, default=40, metavar="N", help="of the ramp (40)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Send and print.

    Raises:
        InputError: a flag outside its rule, or a file that cannot be read.
        RunError: no server, or one that speaks otherwise.
    """
    positive(args, "rate", "duration_s", "rows", "max_connections", "timeout_s", "max_steps")
    if not args.factor > 1:
        raise InputError("--factor must be above 1", got=args.factor)
    from ..bench.load import capacity_per_s, generate, ramp
    from ..bench.requests import target_of

    headers = {}
    if args.token_file is not None:
        lines = _read("--token-file", args.token_file).decode("utf-8", "replace").splitlines()
        headers["Authorization"] = f"Bearer {lines[0].strip() if lines else ''}"
    target = target_of(
        args.url, fmt=args.format, rows=args.rows, headers=headers,
        body=None if args.body is None else _read("--body", args.body),
    )  # fmt: skip

    def at(rate: float) -> LoadReport:
        return generate(
            target.host, target.port, target.requests, rate_per_s=rate,
            duration_s=args.duration_s, arrivals=args.arrivals, timeout_s=args.timeout_s,
            max_connections=args.max_connections, samples_per_request=target.rows,
            on_second=lambda due, ended: live_line(f"{rate:,.0f}/s: {due:,} due, {ended:,} ended"),
        )  # fmt: skip

    if not args.ramp:
        report = at(args.rate)
        live_line("")
        if not write_document(args, {"url": args.url, "format": args.format, **report.to_dict()}):
            print(_text(report))
        return 0
    steps = ramp(at, first_per_s=args.rate, factor=args.factor, max_steps=args.max_steps)
    live_line("")
    document: dict[str, Any] = {
        "url": args.url,
        "format": args.format,
        "capacity_per_s": capacity_per_s(steps),
        "steps": [step.to_dict() for step in steps],
    }
    if not write_document(args, document):
        print(_ramp_text(steps, document["capacity_per_s"]))
    return 0


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{flag} must be a file that can be read", got=error) from None


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.3f}"


def _text(report: LoadReport) -> str:
    from .text import aligned

    shares = (0.5, 0.9, 0.99, 0.999, 1.0)
    rows = [("", *(f"p{share * 100:g}" if share < 1 else "max" for share in shares))]
    for name, histogram in (
        ("latency ms", report.latency),
        ("from sending ms", report.service),
        ("not 200, ms", report.others),
        ("sent late ms", report.lag),
    ):
        if histogram.count:
            rows.append((name, *(_ms(histogram.quantile_s(share)) for share in shares)))
    outcomes = ", ".join(f"{name}: {count:,}" for name, count in report.outcomes.items())
    lines = [
        f"{report.scheduled:,} requests due in {report.duration_s:g} s ({report.rate_per_s:,.0f}/s,"
        f" {report.arrivals}); {report.answered_per_s:,.0f}/s answered with 200, "
        f"{report.answered_per_s * report.samples_per_request:,.0f} samples/s",
        f"  {outcomes}",
        aligned(rows, right=range(1, 6)),
        *(f"  {line}" for line in report.latency.chart()),
        f"  {report.connections:,} connections; the generator took "
        f"{report.generator_cpu_share:.0%} of a CPU",
    ]
    return "\n".join(lines)


def _ramp_text(steps: list[LoadReport], capacity: float) -> str:
    from .text import aligned

    rows = [("asked/s", "200/s", "others/s", "p50 ms", "p99 ms", "generator CPU")]
    for step in steps:
        others = sum(count for name, count in step.outcomes.items() if name != "200")
        rows.append(
            (
                f"{step.rate_per_s:,.0f}", f"{step.answered_per_s:,.0f}",
                f"{others / step.wall_s:,.0f}", _ms(step.latency.quantile_s(0.5)),
                _ms(step.latency.quantile_s(0.99)), f"{step.generator_cpu_share:.0%}",
            )
        )  # fmt: skip
    rate = capacity * steps[0].samples_per_request
    return f"{aligned(rows, right=range(6))}\n  capacity {capacity:,.0f}/s, {rate:,.0f} samples/s"
