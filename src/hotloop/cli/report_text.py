"""A report for a person at a terminal: tables as wide as it is, and plain ones in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..report.document import Document, printable_part
from ..report.memory import components
from ..report.phases import phase_rows
from ..report.placement import machine_of, placement
from ..report.suggestions import STATES, change_lines, gain, ordered, state
from ..units import format_bytes, format_rate, format_seconds, format_share

_UNKNOWN = "not measured"
# Where nobody says how wide the terminal is.
_FILE_WIDTH = 120
_MOST_OPERATIONS = 5


@dataclass(frozen=True)
class Part:
    """A heading and a table below it.

    Attributes:
        rows: cells; all rows of one length. head: titles of columns; empty: none.
        right: numbers of the columns that are aligned to the right.
    """

    title: str
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    right: Sequence[int] = ()


def print_report(
    report: Document, machine: Document, files: Sequence[tuple[str, str]] = ()
) -> None:
    """Print a report: result, speed, time, memory, workers, suggestions, machine, files, notes.

    Args:
        machine: ``Machine.to_dict``. files: names and paths of what the run left.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_FILE_WIDTH)
    with console.capture() as captured:
        # As text objects, which nothing in a name can turn into markup or commands of the terminal.
        console.print(Text(_first_line(report), style="bold"))
        for part in report_parts(report, machine, files):
            table = Table(box=None, show_header=bool(part.head), pad_edge=False,
                          padding=(0, 2, 0, 0), header_style="dim")  # fmt: skip
            for at in range(len(part.rows[0])):
                title = Text(part.head[at] if part.head else "")
                justify: Literal["left", "right"] = "right" if at in part.right else "left"
                table.add_column(title, justify=justify, overflow="fold")
            for row in part.rows:
                table.add_row(*(Text(printable_part(cell)) for cell in row))
            console.print()
            console.print(Text(part.title, style="bold"))
            console.print(Padding(table, (0, 0, 0, 2), expand=False))
    # Without the blanks up to the width of each table.
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def report_parts(
    report: Document, machine: Document, files: Sequence[tuple[str, str]] = ()
) -> list[Part]:
    """The parts that have something to say."""
    parts = [
        Part("Result", _result(report)),
        Part("Speed", _speed(report)),
        _operations(report),
        Part("Time", list(_time(report)), right=(1, 2)),
        Part("Memory", list(_memory(report)), right=(1,)),
        _workers(report),
        _suggestions(report),
        Part("Machine", _machine(report, machine)),
        Part("Files", files),
        Part("Notes", [(text,) for item in report.items("notes") if (text := item.text())]),
    ]
    return [part for part in parts if part is not None and part.rows]


def _first_line(report: Document) -> str:
    steps, batch = report.count("steps"), report.count("batch_size")
    line = report.text("data") or report.text("model") or "A run"
    line += "" if batch is None else f", batch {batch}"
    done = [report.text("stopped"), None if steps is None else f"after {steps} steps"]
    words = " ".join(word for word in done if word)
    return f"{line}: {words}" if words else line


def _result(report: Document) -> list[tuple[str, str]]:
    rows = []
    if (epochs := report.count("epochs")) is not None:
        rows.append(("epochs", str(epochs)))
    for key, title, form in (
        ("train_loss", "training loss", "{:.4f}"),
        ("validation_loss", "test loss", "{:.4f}"),
        ("validation_accuracy", "test accuracy", "{:.2%}"),
    ):
        if (value := report.number(key)) is not None:
            rows.append((title, form.format(value)))
    return rows


def _speed(report: Document) -> list[tuple[str, str]]:
    per_s, flop = report.amount("samples_per_s"), report.amount("flop_per_sample")
    rows = [("throughput", _UNKNOWN if per_s is None else format_rate(per_s, "samples"))]
    if per_s is not None and flop is not None:
        ceiling, share = report.amount("ceiling_flop_per_s"), report.amount("share_of_ceiling")
        against = "the ceiling is not measured: hotloop machine --ceilings"
        if ceiling is not None and share is not None:
            of = format_rate(ceiling, "FLOP")
            against = f"{format_share(share)} of the measured ceiling, {of}"
        rows.append(("arithmetic", f"{format_rate(flop * per_s, 'FLOP')}: {against}"))
    if (path := report.text("path")) is not None:
        reason = report.text("path_reason")
        rows.append(("path", f"{path}: {reason}" if reason else path))
    if (threads := report.count("plan", "cpu", "num_threads")) is not None:
        rows.append(("threads", str(threads)))
    return rows


def _operations(report: Document) -> Part | None:
    """The longest operations of a step and what is left of it."""
    found = report.items("operations")
    shares = [work.amount("time_share") for work in found]
    if not found or None in shares:
        return None
    rows = []
    for work in found[:_MOST_OPERATIONS]:
        kind, count = work.text("kind") or "operation", work.count("count") or 1
        rows.append(
            (
                kind if count == 1 else f"{count} {kind}",
                work.text("shape") or "",
                work.text("kernel") or "",
                format_rate(work.amount("flop_per_s"), "FLOP"),
                format_share(work.amount("share_of_ceiling")),
                format_share(work.amount("time_share")),
            )
        )
    known = [share or 0.0 for share in shares]
    if more := sum(known[_MOST_OPERATIONS:]):
        count = len(found) - _MOST_OPERATIONS
        rows.append((f"{count} more", "", "", "", "", format_share(more)))
    rows.append(("everything else", "", "", "", "", format_share(max(0.0, 1 - sum(known)))))
    head = ("operation", "shape", "kernel", "rate", "ceiling", "time")
    return Part("A step, each operation timed alone", rows, head, right=(3, 4, 5))


def _time(report: Document) -> Iterable[tuple[str, str, str]]:
    wall = report.amount("wall_s")
    for title, _, seconds in phase_rows(report):
        share = seconds / wall if wall else None
        yield title, format_seconds(seconds), "" if share is None else format_share(share)
    if wall is not None:
        yield "in all", format_seconds(wall), ""


def _memory(report: Document) -> Iterable[tuple[str, str]]:
    for _, title, _, size in components(report):
        yield title, _UNKNOWN if size is None else format_bytes(size)
    if (total := report.amount("budget", "total_bytes")) is not None:
        yield "Total", format_bytes(total)
    peak = report.amount("peak_resident_bytes")
    yield "measured peak", _UNKNOWN if peak is None else format_bytes(peak)
    if (error := report.number("prediction_error")) is not None:
        yield "prediction is off by", f"{error:+.1%}"


def _workers(report: Document) -> Part | None:
    rows = []
    for at, worker in enumerate(report.items("performance", "workers")):
        number, cpu, slow = worker.count("worker"), worker.count("cpu"), worker.amount("slowdown")
        seconds = [worker.amount(key) for key in ("busy_s", "wait_s", "update_s")]
        rows.append(
            (
                str(at if number is None else number),
                "-" if cpu is None else str(cpu),
                worker.at("chunks").shown(),
                worker.at("stolen").shown(),
                *(format_seconds(s) for s in seconds),
                "-" if slow is None else format_share(slow),
            )
        )
    head = ("worker", "CPU", "chunks", "stolen", "busy", "waiting", "updating", "of its best")
    return Part("Workers", rows, head, right=tuple(range(1, 8))) if rows else None


def _suggestions(report: Document) -> Part | None:
    rows = []
    for suggestion in ordered(report):
        title = suggestion.text("title") or suggestion.text("name") or "a suggestion"
        told = ", ".join(word for word in (STATES[state(suggestion)], gain(suggestion)) if word)
        exact = "; may change results" if suggestion.flag("exact") is False else ""
        rows.append((f"{title} ({told}{exact})",))
        rows += [(f"  {line}",) for line in change_lines(report, suggestion, arrow="->")]
    return Part("What would help next", rows) if rows else None


def _machine(report: Document, machine: Document) -> list[tuple[str, str]]:
    rows = []
    if (model := machine.text("cpu_model")) is not None:
        usable = machine.count("usable_cpus")
        rows.append(("processor", model if usable is None else f"{model}, {usable} CPUs usable"))
    if report.at("plan"):
        rows.append(("placement", placement(report, machine_of(machine))[1]))
    return rows
