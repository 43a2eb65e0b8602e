"""A training report for a person at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..units import format_bytes, format_rate, format_seconds, format_share
from .live_view import change_text
from .text import aligned

if TYPE_CHECKING:
    from ..train import TrainReport

_SUGGESTIONS = 3
_PHASES = {
    "step": "steps",
    "data_wait": "waiting for data",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "prepare": "preparation",
}


def report_text(report: TrainReport, folder: Path, picture: Path | None) -> str:
    """The report as text: result, speed, time, memory, files, notes."""
    parts = [
        f"{report.data}, batch {report.batch_size}: {report.stopped} after {report.steps} steps",
        "",
        "Result",
        aligned(_result(report)),
        "",
        "Speed",
        aligned(_speed(report)),
        *_operations(report),
        "",
        "Time",
        aligned(_time(report), right=(1, 2)),
        "",
        "Memory",
        aligned(_memory(report), right=(1,)),
        "",
        "Files",
        aligned(_files(report, folder, picture)),
    ]
    if report.optimizations:
        parts += ["", "What may help (not measured yet)", *_suggestions(report)]
    if report.notes:
        parts += ["", "Notes", *(f"  {note}" for note in report.notes)]
    return "\n".join(parts)


def _result(report: TrainReport) -> list[tuple[str, str]]:
    rows = [("epochs", str(report.epochs))]
    if report.train_loss is not None:
        rows.append(("training loss", f"{report.train_loss:.4f}"))
    if report.validation_loss is not None:
        rows.append(("test loss", f"{report.validation_loss:.4f}"))
    if report.validation_accuracy is not None:
        rows.append(("test accuracy", f"{report.validation_accuracy:.2%}"))
    return rows


def _speed(report: TrainReport) -> list[tuple[str, str]]:
    rows = [("throughput", format_rate(report.samples_per_s, "samples"))]
    if report.flop_per_sample is not None and report.samples_per_s is not None:
        rate = format_rate(report.flop_per_sample * report.samples_per_s, "FLOP")
        if report.ceiling_flop_per_s is None:
            share = "the ceiling is not measured: hotloop machine --ceilings"
        else:
            ceiling = format_rate(report.ceiling_flop_per_s, "FLOP")
            share = f"{format_share(report.share_of_ceiling)} of the measured ceiling, {ceiling}"
        rows.append(("arithmetic", f"{rate}: {share}"))
    rows.append(("path", f"{report.path}: {report.path_reason}"))
    rows.append(("threads", str(report.plan["cpu"]["num_threads"])))
    return rows


def _operations(report: TrainReport) -> list[str]:
    """The five longest operations of a step and what is left of it."""
    if not report.operations or report.operations[0]["time_share"] is None:
        return []
    rows = [("operation", "shape", "kernel", "rate", "ceiling", "time")]
    for work in report.operations[:5]:
        kind = work["kind"] if work["count"] == 1 else f"{work['count']} {work['kind']}"
        rate = format_rate(work["flop_per_s"], "FLOP")
        ceiling = format_share(work["share_of_ceiling"])
        share = format_share(work["time_share"])
        rows.append((kind, work["shape"], work["kernel"], rate, ceiling, share))
    more = sum(work["time_share"] for work in report.operations[5:])
    if more:
        rows.append((f"{len(report.operations) - 5} more", "", "", "", "", format_share(more)))
    rest = 1 - sum(work["time_share"] for work in report.operations)
    rows.append(("everything else", "", "", "", "", format_share(rest)))
    return ["", "A step, each operation timed alone", aligned(rows, right=(3, 4, 5))]


def _time(report: TrainReport) -> list[tuple[str, str, str]]:
    wall = report.wall_s or 1.0
    rows = [
        (title, format_seconds(report.time_s[phase]), format_share(report.time_s[phase] / wall))
        for phase, title in _PHASES.items()
        if phase in report.time_s
    ]
    return [*rows, ("in all", format_seconds(report.wall_s), "")]


def _memory(report: TrainReport) -> list[tuple[str, str]]:
    rows = [(title, format_bytes(size)) for title, size in report.budget.table()]
    error = report.prediction_error
    measured = format_bytes(report.peak_resident_bytes)
    rows.append(("measured peak", measured))
    if error is not None:
        rows.append(("prediction is off by", f"{error:+.1%}"))
    return rows


def _suggestions(report: TrainReport) -> list[str]:
    lines = []
    for item in report.optimizations[:_SUGGESTIONS]:
        gain = ""
        if item.expected_gain:
            gain = f" (by about {item.expected_gain:.0%}: {item.gain_source})"
        exact = "" if item.exact else "; changes the results"
        lines += [f"  {item.title}{gain}", f"    {change_text(item)}{exact}"]
    return lines


def _files(report: TrainReport, folder: Path, picture: Path | None) -> list[tuple[str, str]]:
    rows = [("report", str(folder / "report.json"))]
    if picture is not None:
        rows.append(("learning curve", str(picture)))
    if report.checkpoint is not None:
        rows.append(("checkpoint", report.checkpoint))
    return rows
