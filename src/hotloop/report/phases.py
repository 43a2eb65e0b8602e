"""Where the time went: the whole call by phase, training by phase, and both over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from ..units import format_rate, format_seconds, format_share
from .chart import SMALL, Axis, Frame, Point, Size, chart, room_above, text
from .document import Document
from .elements import UNKNOWN, Child, bar, facts, keyed, note, section, table, tag

# Phases of a call, as ``TrainReport.time_s`` has them: title and colour.
PHASES = {
    "step": ("steps", 1),
    "data_wait": ("waiting for data", 2),
    "evaluate": ("evaluation", 3),
    "checkpoint": ("checkpoints", 4),
    "prepare": ("preparation", 5),
}
# Phases of training, as ``StepTimes`` has them.
TRAINING = {
    "compute_s": ("compute", 1),
    "data_wait_s": ("waiting for data", 2),
    "synchronize_s": ("waiting for each other", 6),
    "update_s": ("update", 7),
}
_OTHER = 8
# Looks of the monitor are shown as means over windows so long, and so many at most.
_WINDOW_S = 1.0
_MOST_WINDOWS = 120


def phases(report: Document) -> Element:
    """The section."""
    halves = [tag("div", half) for half in (_call(report), _training(report)) if half]
    return section("time", "Where the time went", tag("div", halves, class_="halves"),
                   *_over_time(report))  # fmt: skip


def phase_rows(report: Document) -> list[tuple[str, int, float]]:
    """Title, colour and seconds of each phase of the call; what no phase covers comes last."""
    rows = []
    for key, seconds in report.pairs("time_s"):
        title, colour = PHASES.get(key, (key.replace("_", " "), _OTHER))
        if (amount := seconds.amount()) is not None:
            rows.append((title, colour, amount))
    order = [title for title, _ in PHASES.values()]
    rows.sort(key=lambda row: order.index(row[0]) if row[0] in order else len(order))
    wall = report.amount("wall_s")
    rest = 0.0 if wall is None else wall - sum(row[2] for row in rows)
    if rows and wall and rest > 0.005 * wall:
        rows.append(("everything else", _OTHER, rest))
    return rows


def _call(report: Document) -> list[Child]:
    rows = phase_rows(report)
    if not rows:
        return [note(f"Seconds by phase: {UNKNOWN}.")]
    whole = max(sum(row[2] for row in rows), report.amount("wall_s") or 0.0)
    return _bar_and_table("The whole call", rows, whole)


def _training(report: Document) -> list[Child]:
    step = report.at("performance", "step")
    rows = [
        (title, colour, seconds)
        for key, (title, colour) in TRAINING.items()
        if (seconds := step.amount(key))
    ]
    if not rows:
        return []
    shown: list[Child] = _bar_and_table("Training alone", rows, sum(row[2] for row in rows))
    together = "Forward, backward and update are one compiled piece: the update is in compute."
    if step and step.amount("update_s") is None:
        shown.append(note(together))
    calls = []
    for key, title in (("median_call_s", "median call of the step"),
                       ("slowest_call_s", "slowest call")):  # fmt: skip
        if (seconds := step.amount(key)) is not None:
            calls.append((title, format_seconds(seconds)))
    if (count := step.count("calls")) and (steps := step.count("steps")):
        calls.append(("calls", f"{count:,} for {steps:,} steps"))
    return [*shown, facts(calls)] if calls else shown


def _bar_and_table(title: str, rows: list[tuple[str, int, float]], whole: float) -> list[Child]:
    parts = [(colour, seconds) for _, colour, seconds in rows]
    cells: list[tuple[Child, ...]] = [
        (keyed(colour, name), format_seconds(seconds), format_share(_over(seconds, whole)))
        for name, colour, seconds in rows
    ]
    total = ("in all", format_seconds(whole), "")
    said = f"{title}: " + ", ".join(f"{row[0]} {row[2]}" for row in _words(rows, whole))
    return [
        tag("h3", title),
        bar(said, parts, whole, height=30),
        table(f"{title}, by phase", ("phase", "time", "share"), [*cells, total], right=(1, 2),
              total=True),
    ]  # fmt: skip


def _words(rows: list[tuple[str, int, float]], whole: float) -> list[tuple[str, int, str]]:
    return [(name, colour, format_share(_over(seconds, whole))) for name, colour, seconds in rows]


def _over(seconds: float, whole: float) -> float | None:
    return seconds / whole if whole > 0 else None


def series(report: Document, key: str) -> list[Point]:
    """Seconds and one figure of each of the monitor's samples that has both."""
    points = []
    for sample in report.items("performance", "samples"):
        t_s, value = sample.amount("t_s"), sample.amount(key)
        if t_s is not None and value is not None:
            points.append((t_s, value))
    return sorted(points)


def _over_time(report: Document) -> list[Child]:
    drawn = []
    for key, title, axis, colour, show in (
        ("samples_per_s", "Throughput over time", "samples/s", 1, short_rate),
        ("cpu_fraction", "Processor use over time", "share of the usable CPUs", 3, format_share),
    ):
        points = series(report, key)
        window_s = max(_WINDOW_S, points[-1][0] / _MOST_WINDOWS) if points else _WINDOW_S
        name = f"{title}, means of {window_s:.2g} s"
        means = means_over(points, window_s)
        drawn.append(over_time(key.replace("_", "-"), name, axis, colour, means, show))
    return [tag("div", drawn, class_="charts")] if any(d is not None for d in drawn) else []


def means_over(points: Sequence[Point], window_s: float) -> list[Point]:
    """Rates since the look before, as means over windows of at least ``window_s``.

    A call of the step counts when it ends. Where calls are about as long as the time between two
    looks, single looks see none and then two.

    Returns:
        End of each window and its mean; the last window may be shorter.
    """
    means: list[Point] = []
    started = last = total = 0.0
    for t_s, rate in points:
        total += rate * (t_s - last)
        last = t_s
        if t_s - started >= window_s or (t_s, rate) == points[-1]:
            # A last window much shorter than the others would say little.
            if t_s - started >= window_s / 2 or not means:
                means.append((t_s, total / (t_s - started) if t_s > started else rate))
            started, total = t_s, 0.0
    return means


def over_time(
    key: str,
    title: str,
    axis: str,
    colour: int,
    points: Sequence[Point],
    show: Callable[[float], str],
    lines: Sequence[tuple[float, str]] = (),
    unit: float = 1.0,
) -> Element | None:
    """A chart of one figure over seconds; ``None`` where there are no two moments of it.

    Args:
        show: how a figure reads. lines: levels to hold it against, and what they are.
        unit: ticks are round multiples of it.
    """
    if len(points) < 2 or points[0][0] >= points[-1][0]:
        return None
    values = [value for _, value in points]
    top = room_above([*values, *(level for level, _ in lines)])

    def draw(size: Size) -> list[Element]:
        x = Axis(points[0][0], points[-1][0], "seconds", lambda v: f"{v:g}")
        frame = Frame(size, x, Axis(0.0, top, axis, show, unit=unit))
        marks = [*frame.axes(), frame.line(points, f"line{colour}")]
        for level, name in lines:
            marks.append(frame.line([(x.low, level), (x.high, level)], "roof"))
            right, up = frame.at(x.high, level)
            # On the side of the line where the course is not.
            beside = up + 16 if values[-1] > level else up - 6
            marks.append(text(right - 4, beside, name, "label", anchor="end"))
        return marks

    said = f"From {show(values[0])} to {show(values[-1])} over {points[-1][0]:.3g} seconds, "
    said += f"{show(min(values))} at least and {show(max(values))} at most."
    said += "".join(f" Level: {name}." for _, name in lines)
    return chart(key, title, said, draw, (SMALL,))


def short_rate(value: float) -> str:
    """A rate as a tick of an axis that names its unit: ``"350 G"``."""
    number, _, prefix = format_rate(value, "").removesuffix("/s").rstrip().partition(" ")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return f"{number} {prefix}".rstrip()
