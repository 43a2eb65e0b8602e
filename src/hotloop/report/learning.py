"""The learning curve: loss of each batch, loss and accuracy on test data by epoch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from ..units import format_seconds
from .chart import SMALL, Axis, Frame, Point, Size, chart, key_line, thinned
from .document import Document
from .elements import Child, note, section, table, tag

# Smoothed over so much of the run: the noise of single batches hides the course of all of them.
_SMOOTHING = 0.05
_MOST_POINTS = 500
_MOST_ROWS = 20


def learning(report: Document) -> Element:
    """The section."""
    parts = [*_losses(report), *_accuracy(report)]
    shown: list[Child] = [tag("div", parts, class_="charts")] if parts else []
    shown.append(_table(report) or note("No epoch was finished."))
    return section("learning", "How it learned", shown)


def _curve(report: Document) -> list[Point]:
    points = []
    for pair in report.items("curve"):
        numbers = [item.number() for item in pair.items()]
        if len(numbers) == 2 and numbers[0] is not None and numbers[1] is not None:
            points.append((numbers[0], numbers[1]))
    return sorted(points)


def _by_epoch(report: Document, key: str) -> list[Point]:
    points = []
    for record in report.items("history"):
        step, value = record.number("steps"), record.number(key)
        if step is not None and value is not None:
            points.append((step, value))
    return sorted(points)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of the points around each: neither behind the course nor ahead of it."""
    reach = round(len(points) * _SMOOTHING / 2)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    smooth: list[Point] = []
    for at, (step, _) in enumerate(points):
        # As many before as after, so that the ends are not drawn towards the middle.
        near = min(reach, at, len(points) - 1 - at)
        smooth.append((step, (sums[at + near + 1] - sums[at - near]) / (2 * near + 1)))
    return smooth


def _losses(report: Document) -> list[Element]:
    curve, tested = _curve(report), _by_epoch(report, "validation_loss")
    points = [*curve, *tested]
    if len(curve) < 2 or curve[0][0] >= curve[-1][0]:
        return []
    low = min(0.0, *(value for _, value in points))
    high = max(value for _, value in points)
    high = low + max((high - low) * 1.06, 1e-9)
    smooth = smoothed(curve)

    def draw(size: Size) -> list[Element]:
        x = Axis(min(p[0] for p in points), max(p[0] for p in points), "step", _steps, whole=True)
        frame = Frame(size, x, Axis(low, high, "loss", lambda v: f"{v:g}"))
        marks = [*frame.axes(), frame.line(thinned(curve, _MOST_POINTS), "faint line1")]
        marks.append(frame.line(thinned(smooth, _MOST_POINTS), "line1"))
        marks += _dots(frame, tested, 2)
        marks += key_line(frame, 0, "training, smoothed", "line1")
        return marks + (key_line(frame, 1, "test, each epoch", "line2") if tested else [])

    said = f"Loss from {curve[0][1]:.4g} at step {curve[0][0]:,.0f} to {smooth[-1][1]:.4g} "
    said += f"(smoothed) at step {curve[-1][0]:,.0f}."
    if tested:
        said += f" On test data {tested[-1][1]:.4g} at the end."
    return [chart("loss", "Loss by step", said, draw, (SMALL,))]


def _accuracy(report: Document) -> list[Element]:
    tested = [p for p in _by_epoch(report, "validation_accuracy") if 0 <= p[1] <= 1]
    if len(tested) < 2 or tested[0][0] >= tested[-1][0]:
        return []
    least = min(value for _, value in tested)
    # So far below 1 that the course shows, and never so near that noise looks like progress.
    low = max(0.0, 1 - 1.5 * max(1 - least, 0.02))

    def draw(size: Size) -> list[Element]:
        x = Axis(tested[0][0], tested[-1][0], "step", _steps, whole=True)
        frame = Frame(size, x, Axis(low, 1.0, "accuracy on test", lambda v: f"{v * 100:.4g} %"))
        return [*frame.axes(), frame.line(tested, "line2"), *_dots(frame, tested, 2)]

    said = f"Accuracy on test data from {tested[0][1]:.2%} to {tested[-1][1]:.2%}."
    return [chart("accuracy", "Accuracy by step", said, draw, (SMALL,))]


def _dots(frame: Frame, points: Sequence[Point], colour: int) -> list[Element]:
    dots = []
    for point in thinned(points, 60):
        x, y = frame.at(*point)
        dots.append(tag("circle", cx=x, cy=y, r=3.5, class_=f"dot fill{colour}"))
    return dots


def _steps(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.0f}"


def _table(report: Document) -> Element | None:
    history = report.items("history")
    stride = max(1, -(-len(history) // _MOST_ROWS))
    kept = [r for at, r in enumerate(history, 1) if at % stride == 0 or at == len(history)]
    rows = []
    for record in kept:
        epoch = record.count("epoch")
        accuracy, rate = record.number("validation_accuracy"), record.amount("samples_per_s")
        rows.append(
            (
                "?" if epoch is None else f"{epoch + 1:,}",
                _figure(record.number("train_loss"), "{:.4f}"),
                _figure(record.number("validation_loss"), "{:.4f}"),
                _figure(accuracy, "{:.2%}"),
                _figure(record.number("learning_rate"), "{:.3g}"),
                format_seconds(record.amount("train_s")),
                _figure(rate, "{:,.0f}"),
            )
        )
    if not rows:
        return None
    caption = "Epochs" if stride == 1 else f"Every {stride}th epoch, and the last"
    head = ("epoch", "loss", "loss on test", "accuracy", "learning rate", "trained", "samples/s")
    return table(caption, head, rows, right=(1, 2, 3, 4, 5, 6))


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
