"""What to change in a script next: rules over a ``RunReport``, hypotheses until measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..monitor.optimization import Change, Evidence, Optimization
from ..units import format_seconds, format_share

if TYPE_CHECKING:
    from .report import RunReport

# Runs below this say little.
_LEAST_LOOP_S = 2.0


def suggest(report: RunReport) -> tuple[Optimization, ...]:
    """Suggestions, those that promise most first. A pure function of the report."""
    if report.loop_s < _LEAST_LOOP_S or report.num_threads is None:
        return ()
    found = (rule(report) for rule in _RULES)
    return tuple(o for o in found if o is not None)


def _data_bound(report: RunReport) -> Optimization | None:
    wait = report.data_wait_s
    if wait is None or wait < 0.2 * report.loop_s:
        return None
    share = wait / report.loop_s
    spare = (report.usable_cpus or 1) > 1 and report.loader_workers == 0
    command = (
        "DataLoader(..., num_workers=1, persistent_workers=True), or transform whole batches "
        "instead of single samples"
        if spare
        else "transform whole batches instead of single samples"
    )
    return Optimization(
        name="data-bound",
        title="The loop waits for its DataLoader",
        evidence=Evidence(
            metric="data_wait_s / loop_s",
            value=round(share, 3),
            threshold=0.2,
            threshold_source="a fifth of the loop: less gains less than a change of code is worth",
            text=f"{format_seconds(wait)}, {format_share(share)} of the loop, "
            f"{report.loader_workers or 0} workers",
        ),
        change=Change(command=command),
        # All of the wait hidden would be the most.
        expected_gain=round(1 / (1 - min(share, 0.9)) - 1, 2),
        gain_source="the most it can be: all of the wait hidden behind compute",
    )


def _too_many_workers(report: RunReport) -> Optimization | None:
    workers, cpus = report.loader_workers, report.usable_cpus
    if not workers or cpus is None or workers <= cpus:
        return None
    return Optimization(
        name="loader-workers",
        title="More DataLoader workers than CPUs",
        evidence=Evidence(
            metric="loader_workers",
            value=workers,
            threshold=cpus,
            threshold_source="CPUs this process may use at once",
            text=f"{workers} workers on {cpus} CPUs",
        ),
        change=Change(command=f"DataLoader(..., num_workers={max(1, cpus - 1)})"),
    )


def _oversubscribed(report: RunReport) -> Optimization | None:
    threads, cpus = report.num_threads, report.usable_cpus
    if threads is None or cpus is None or threads <= cpus:
        return None
    return Optimization(
        name="oversubscription",
        title="The script asks for more threads than can run",
        evidence=Evidence(
            metric="num_threads",
            value=threads,
            threshold=cpus,
            threshold_source="CPUs this process may use at once",
            text=f"{threads} threads on {cpus} CPUs",
        ),
        change=Change(command="leave torch.set_num_threads out"),
    )


def _neighbour(report: RunReport) -> Optimization | None:
    delay = report.run_delay_s
    if delay is None or delay < 0.1 * report.loop_s:
        return None
    share = delay / report.loop_s
    return Optimization(
        name="noisy-neighbour",
        title="Others used its CPUs, and its threads wait for each other by spinning",
        evidence=Evidence(
            metric="run_delay_s / loop_s",
            value=round(share, 3),
            threshold=0.1,
            threshold_source="a tenth of the loop",
            text=f"ready but without a CPU for {format_seconds(delay)}",
        ),
        change=Change(command="GOMP_SPINCOUNT=1000 hotloop run ..., or a thread less"),
        gain_source="docs/run.md: 2 times under one busy neighbour, but 10 % slower without",
    )


def _memory_short(report: RunReport) -> Optimization | None:
    per_s = report.major_faults / report.loop_s
    if per_s < 100:
        return None
    return Optimization(
        name="memory-short",
        title="Pages are read back from storage",
        evidence=Evidence(
            metric="major_faults / loop_s",
            value=round(per_s, 1),
            threshold=100,
            threshold_source="a page from storage takes about 0.1 ms: one per cent of the time",
            text=f"{report.major_faults:,} page faults from storage",
        ),
        change=Change(command="a smaller batch, or data that is read instead of mapped"),
    )


def _plain_update(report: RunReport) -> Optimization | None:
    if not report.update_s or report.fused_updates or report.update_s < 0.05 * report.loop_s:
        return None
    share = report.update_s / report.loop_s
    return Optimization(
        name="fused-optimizer",
        title="Adam is not fused",
        evidence=Evidence(
            metric="update_s / loop_s",
            value=round(share, 3),
            threshold=0.05,
            threshold_source="a twentieth of the loop",
            text=f"{format_seconds(report.update_s)}, {format_share(share)} of the loop",
        ),
        change=Change(command="torch.optim.Adam(..., fused=True)"),
    )


def _bfloat16(report: RunReport) -> Optimization | None:
    share = report.product_s / report.loop_s
    if not report.bfloat16 or share < 0.3:
        return None
    return Optimization(
        name="bfloat16",
        title="The processor multiplies bfloat16 faster",
        evidence=Evidence(
            metric="product_s / loop_s",
            value=round(share, 3),
            threshold=0.3,
            threshold_source="a third of the loop in float32 products",
            text=f"{format_share(share)} of the loop in float32 products",
        ),
        change=Change(command='with torch.autocast("cpu", torch.bfloat16): forward and loss'),
        exact=False,
    )


def _whole_step(report: RunReport) -> Optimization | None:
    waits = (report.data_wait_s or 0.0) / report.loop_s
    if not report.updates or waits > 0.5:
        return None
    return Optimization(
        name="compiled-step",
        title="Forward, backward and update could be one compiled step",
        evidence=Evidence(
            metric="updates",
            value=report.updates,
            threshold=1,
            threshold_source="a script that trains",
            text=f"{report.updates:,} updates, each operation called from Python",
        ),
        change=Change(command="step = hotloop.compile_step(model, loss_fn, optimizer, (x, y))"),
        gain_source="README.md: its races against PyTorch as written",
    )


_RULES: tuple[Callable[[RunReport], Optimization | None], ...] = (
    _oversubscribed,
    _neighbour,
    _memory_short,
    _data_bound,
    _too_many_workers,
    _plain_update,
    _whole_step,
    _bfloat16,
)
