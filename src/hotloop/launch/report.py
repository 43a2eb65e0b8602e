"""``RunReport``: what a launched script took and where it waited; as values, and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..monitor.optimization import Optimization
from ..monitor.record import Record
from ..units import format_bytes, format_rate, format_seconds, format_share

FORMAT = 3
# Shapes of products listed in the text; the JSON has all.
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class RunReport(Record):
    """One process of a launched script, from its start to its end.

    Attributes:
        script: ``sys.argv`` of it. rank: its number under torchrun; ``None``: no ranks.
        changes: what hotloop changed, in words.
        wall_s: from the command to the end. startup_s: until torch was loaded; ``None``: it was
            not imported.
        user_s, system_s: CPU seconds of all threads. children_s: of processes waited for.
        num_threads: torch's threads at the end; ``None``: no torch.
        usable_cpus: threads that can run at once on this machine.
        run_delay_s: the main thread was ready to run and had no CPU.
        peak_resident_bytes: highest resident memory.
        minor_faults, major_faults: page faults without and with reading storage.
        voluntary_switches, involuntary_switches: context switches.
        data_wait_s: in getting batches from DataLoaders; ``None``: none was used.
        batches: batches they gave. batches_at_once: of them, those read by one look-up.
        loader_workers: the most workers one had.
        update_s: in Adam's update, and in others that hotloop's kernel made; ``None``: not seen.
        updates: how many. fused_updates: how many of them by a kernel.
        product_s: in the routed matrix products. routed: whether products were routed at all.
        products: each shape, see ``ProductUse``, with ``flop_per_s``; the longest first.
        operators: others that hotloop's kernels may make, see ``OperatorUse``.
        bfloat16: whether the processor multiplies in bfloat16; ``None``: not known.
        optimizations: what to try next.
    """

    script: tuple[str, ...]
    rank: int | None = None
    changes: tuple[str, ...] = ()
    wall_s: float
    startup_s: float | None = None
    user_s: float
    system_s: float
    children_s: float = 0.0
    num_threads: int | None = None
    usable_cpus: int | None = None
    run_delay_s: float | None = None
    peak_resident_bytes: int | None = None
    minor_faults: int = 0
    major_faults: int = 0
    voluntary_switches: int = 0
    involuntary_switches: int = 0
    data_wait_s: float | None = None
    batches: int = 0
    batches_at_once: int = 0
    loader_workers: int | None = None
    update_s: float | None = None
    updates: int = 0
    fused_updates: int = 0
    product_s: float = 0.0
    routed: bool = False
    products: tuple[dict[str, Any], ...] = ()
    operators: tuple[dict[str, Any], ...] = ()
    bfloat16: bool | None = None
    optimizations: tuple[Optimization, ...] = ()
    format: int = FORMAT

    @property
    def loop_s(self) -> float:
        """The time after torch was loaded."""
        return max(0.0, self.wall_s - (self.startup_s or 0.0))


def report_text(report: RunReport) -> str:
    """The report for a terminal."""
    title = "hotloop: report" if report.rank is None else f"hotloop: report of rank {report.rank}"
    rows = [
        ("time", _time(report)),
        ("CPU", _cpu(report)),
        ("memory", _memory(report)),
        *_labelled("products", _products(report)),
        *_labelled("operators", _operators(report)),
        *_labelled("data", _data(report)),
        *_labelled("next", [_suggestion(o) for o in report.optimizations]),
    ]
    return "\n".join([title, *(f"  {label:<9} {text}" for label, text in rows)])


def _time(report: RunReport) -> str:
    parts = []
    if report.startup_s is not None:
        parts.append(f"start-up {format_seconds(report.startup_s)}")
    if report.data_wait_s is not None:
        parts.append(f"waited for data {format_seconds(report.data_wait_s)}")
    if report.update_s is not None:
        parts.append(f"updates {format_seconds(report.update_s)}")
    if report.product_s:
        parts.append(f"routed products {format_seconds(report.product_s)}")
    if report.run_delay_s is not None and report.run_delay_s > 0.01 * report.wall_s:
        parts.append(f"ready but without a CPU {format_seconds(report.run_delay_s)}")
    return format_seconds(report.wall_s) + (f": {', '.join(parts)}" if parts else "")


def _cpu(report: RunReport) -> str:
    busy = (report.user_s + report.system_s) / report.wall_s if report.wall_s else 0.0
    of = f" of {report.usable_cpus}" if report.usable_cpus is not None else ""
    text = (
        f"{format_seconds(report.user_s)} user, {format_seconds(report.system_s)} system: "
        f"{busy:.1f}{of} CPUs"
    )
    if report.num_threads is not None:
        text += f", {report.num_threads} thread{'s' * (report.num_threads != 1)}"
    if report.children_s:
        text += f"; children {format_seconds(report.children_s)}"
    return text


def _memory(report: RunReport) -> str:
    storage = f", {report.major_faults:,} from storage" if report.major_faults else ""
    peak = format_bytes(report.peak_resident_bytes)
    return f"peak {peak}, {report.minor_faults:,} page faults{storage}"


def _products(report: RunReport) -> list[str]:
    lines = []
    for use in report.products[:_LISTED]:
        batch = f"{use['batch']} x " if use["batch"] else ""
        shape = f"{batch}{use['m']} x {use['k']} x {use['n']} {use['layout']}"
        rate = format_rate(use["flop_per_s"], "FLOP")
        kernel = use["kernel"] or "timing"
        tried = "".join(
            f", {name} {format_seconds(seconds)}" for name, seconds in use["kernel_s"].items()
        )
        lines.append(f"{shape:<26} {kernel:<7} {rate:>12}, {use['calls']:,} calls{tried}")
    more = report.products[_LISTED:]
    if more:
        seconds = sum(use["seconds"] for use in more)
        lines.append(f"{len(more)} more shapes, {format_seconds(seconds)}")
    return lines


def _operators(report: RunReport) -> list[str]:
    return [
        f"{use['name']}: {use['taken']:,} of {use['calls']:,} by hotloop's kernel"
        + (f", {format_seconds(use['saved_s'])} saved" if use["saved_s"] else "")
        for use in report.operators
    ]


def _data(report: RunReport) -> list[str]:
    if not report.batches_at_once:
        return []
    return [f"{report.batches_at_once:,} of {report.batches:,} batches by one look-up"]


def _suggestion(optimization: Optimization) -> str:
    gain = optimization.expected_gain
    text = f"{optimization.title}: {optimization.change.command or ''}".rstrip(": ")
    kind = optimization.state if optimization.exact else f"{optimization.state}, not exact"
    expected = "" if gain is None else f", about {format_share(gain)} faster"
    return f"{text} ({kind}{expected}; {optimization.evidence.text})"


def _labelled(label: str, texts: list[str]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", text) for i, text in enumerate(texts)]
