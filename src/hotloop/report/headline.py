"""The top of the page: what was trained, and the four figures that are asked for first."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from ..units import format_bytes, format_rate, format_share
from .document import Document
from .elements import UNKNOWN, bar, tag


def header(report: Document) -> Element:
    """The name of the run, how it went, and the headline figures."""
    title = report.text("model") or "Unnamed model"
    # What is in brackets says where the data came from, which is no part of a title.
    data, _, where = (report.text("data") or "").partition(" (")
    return tag(
        "header",
        tag("p", "hotloop report", class_="brand"),
        tag("h1", title, tag("span", f" on {data}", class_="data") if data else None),
        tag("p", " · ".join(_how(report)), class_="how"),
        tag("p", f"Data: {where.removesuffix(')')}", class_="how") if where else None,
        tag("dl", [_throughput(report), _share(report), _memory(report), _quality(report)],
            class_="headline"),
    )  # fmt: skip


def _how(report: Document) -> list[str]:
    steps, stopped = report.count("steps"), report.text("stopped")
    batch, parameters = report.count("batch_size"), report.count("parameters")
    parts = []
    if stopped or steps is not None:
        after = f"after {steps:,} steps" if steps is not None else ""
        parts.append(" ".join(word for word in (stopped, after) if word))
    if batch is not None:
        parts.append(f"batch {batch:,}")
    if parameters is not None:
        parts.append(f"{parameters:,} parameters")
    parts += [word for key in ("precision", "path") if (word := report.text(key))]
    cpu = report.text("machine", "cpu_model")
    return [*parts, cpu] if cpu else parts


def _figure(
    label: str, value: str | None, unit: str, said: str, drawn: Element | None = None
) -> Element:
    if value is None:
        big = tag("dd", UNKNOWN, class_="value unknown")
    else:
        big = tag("dd", value, tag("span", f" {unit}", class_="unit") if unit else None,
                  class_="value")  # fmt: skip
    below = tag("dd", drawn, said, class_="said") if said or drawn is not None else None
    return tag("div", tag("dt", label), big, below)


def _throughput(report: Document) -> Element:
    rate = report.amount("samples_per_s")
    threads = report.count("plan", "cpu", "num_threads")
    workers = report.count("plan", "parallel", "num_workers")
    said = ""
    if workers is not None:
        said = f"{workers:,} worker{'s' if workers != 1 else ''}"
    elif threads is not None:
        said = f"{threads:,} thread{'s' if threads != 1 else ''}"
    value = None if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    return _figure("Throughput", value, "samples/s", said)


def _share(report: Document) -> Element:
    share, ceiling = report.amount("share_of_ceiling"), report.amount("ceiling_flop_per_s")
    rate = flop_rate(report)
    label = "Share of the measured ceiling"
    if share is None:
        said = "hotloop machine --ceilings measures it" if ceiling is None else ""
        return _figure(label, None, "", said)
    said = f"of {format_rate(ceiling, 'FLOP')}" if ceiling is not None else ""
    if rate is not None:
        said = f"{format_rate(rate, 'FLOP')} {said}"
    drawn = bar(f"{format_share(share)} of the ceiling", [(1, share)], 1.0, height=6)
    return _figure(label, f"{share * 100:.0f}", "%", said, drawn)


def flop_rate(report: Document) -> float | None:
    """Floating-point operations a second over the run's training."""
    flop, rate = report.amount("flop_per_sample"), report.amount("samples_per_s")
    return None if flop is None or rate is None else flop * rate


def _memory(report: Document) -> Element:
    peak, predicted = report.amount("peak_resident_bytes"), report.amount("budget", "total_bytes")
    said = (
        "prediction not recorded" if predicted is None else f"predicted {format_bytes(predicted)}"
    )
    error = report.number("prediction_error")
    if error is not None and predicted is not None:
        said += f", off by {error * 100:+.1f} %"
    value, _, unit = format_bytes(peak).partition(" ")
    return _figure("Peak memory, measured", None if peak is None else value, unit, said)


def _quality(report: Document) -> Element:
    accuracy = report.number("validation_accuracy")
    loss, trained = report.number("validation_loss"), report.number("train_loss")
    said = [f"{loss:.4f} on test" for loss in (loss,) if loss is not None]
    said += [f"{trained:.4f} in training" for trained in (trained,) if trained is not None]
    if accuracy is not None:
        told = "loss " + ", ".join(said) if said else ""
        return _figure("Accuracy on test", f"{accuracy * 100:.2f}", "%", told)
    if loss is not None:
        return _figure("Loss on test", f"{loss:.4f}", "", said[-1] if trained is not None else "")
    return _figure("Loss in training", None if trained is None else f"{trained:.4f}", "",
                   "no test data")  # fmt: skip
