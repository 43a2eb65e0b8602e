"""Batches that come too late, loaders that disturb the step, queues too long and too short."""

from __future__ import annotations

from pathlib import Path

from ...units import format_bytes, format_share
from ..metrics import HotSpot
from ..optimization import Change, Optimization
from . import thresholds as t
from .facts import Facts, Rule, found, gain_of


def loader_workers(facts: Facts) -> Optimization | None:
    """More processes that prepare data than CPUs."""
    children = facts.children
    delay = facts.run_delay or 0.0
    if children <= facts.cpus or (
        facts.data_wait < t.DATA_WAIT.value and delay < t.RUN_DELAY.value
    ):
        return None
    lost = max(facts.data_wait, delay)
    # Workers gain where CPUs are idle; beside threads that use all, they only add copies.
    goal = max(0, facts.cpus - (facts.threads or 1))
    command = f"DataLoader(..., num_workers={goal}"
    command += ", persistent_workers=True)" if goal else ")"
    return found(
        "loader-workers",
        f"{children} processes prepare data on {facts.cpus} CPUs, which the step needs too",
        "cpu.child_processes",
        children,
        t.Threshold(facts.cpus, "a warning of torch.utils.data.DataLoader: more than the CPUs"),
        Change(command=f"{command}; better still, slice whole batches from one tensor"),
        text=f"the step waited for data {format_share(facts.data_wait)} of the time, its threads "
        f"for a CPU {format_share(delay)} of theirs",
        gain=gain_of(lost),
        gain_source="the larger of data wait and wait for a CPU",
    )


def python_transform(facts: Facts) -> Optimization | None:
    """The step waits while one Python function runs, sample by sample."""
    spot = _hot(facts)
    if spot is None or facts.data_wait < t.DATA_WAIT.value:
        return None
    lost = facts.data_wait * min(1.0, spot.share)
    where = f"{Path(spot.file).name}:{spot.line}"
    return found(
        "python-transform",
        f"{spot.function} ({where}) runs in Python while the step waits for its batch",
        "hot_spots[].share in data_wait",
        spot.share,
        t.HOT_SHARE,
        Change(
            command=f"make {spot.function} work on a whole batch of tensors at once, or apply it "
            "once before training and keep the result (hotloop.open_dataset packs a Dataset once)"
        ),
        text=f"the step waited for data {format_share(facts.data_wait)} of the time, and "
        f"{spot.function} was running in {format_share(spot.share)} of the looks",
        gain=gain_of(lost),
        gain_source="data wait times the share of looks in the function",
    )


def data_bound(facts: Facts) -> Optimization | None:
    """The step waits for batches, and no single cause is seen."""
    if facts.data_wait < t.DATA_WAIT.value or _hot(facts) or facts.children > facts.cpus:
        return None
    if _is_short_queue(facts) or (facts.report.work.steps_per_call or 1) > 1:
        return None  # The Trainer gathers between calls because that is the faster way.
    spare = facts.cpus - 1
    change = Change(
        command="keep the samples as one tensor and slice batches from it; "
        "hotloop.Trainer packs any Dataset once"
    )
    if facts.has_plan:
        change = Change(
            command="prepare less per batch: pack bytes instead of floats, drop or precompute "
            "transforms, keep the samples in memory (--mmap-above)"
        )
    elif spare > 0 and not facts.children:
        change = Change(
            command=f"DataLoader(..., num_workers={spare}, persistent_workers=True), or "
            + (change.command or "")
        )
    return found(
        "data-bound",
        f"the step waits for data {format_share(facts.data_wait)} of the time",
        "step.data_wait_s / (data wait, compute, synchronize and update)",
        facts.data_wait,
        t.DATA_WAIT,
        change,
        gain=gain_of(facts.data_wait),
        gain_source="share of the training time spent waiting for batches",
    )


def queue_too_long(facts: Facts) -> Optimization | None:
    """Batches prepared far ahead take memory and leave the caches before they are used."""
    size, queue = facts.report.work.queue_bytes, facts.knob("cpu.queue_size")
    limit = facts.report.memory.limit_bytes
    if not size or not queue or queue <= 16 or not limit:
        return None
    if size < min(t.QUEUE_SHARE.value * limit, 2**28):
        return None
    return found(
        "queue-size",
        f"{queue} batches prepared ahead hold {format_bytes(size)}",
        "work.queue_bytes",
        size,
        t.Threshold(min(t.QUEUE_SHARE.value * limit, 2**28), t.QUEUE_SHARE.source),
        Change(plan={"cpu.queue_size": 4}),
        text=f"{format_bytes(size)} of memory, and each batch is cold when its turn comes",
        gain=0.0,
        gain_source="memory, not time, where batches are prepared faster than they are used",
    )


def queue_too_short(facts: Facts) -> Optimization | None:
    """Nothing is prepared while the step runs a slow batch."""
    if not _is_short_queue(facts):
        return None
    return found(
        "queue-size",
        f"the step waits for data with {facts.knob('cpu.queue_size')} batch prepared ahead",
        "step.data_wait_s / (data wait, compute, synchronize and update)",
        facts.data_wait,
        t.DATA_WAIT,
        Change(plan={"cpu.queue_size": 8}),
    )


def _is_short_queue(facts: Facts) -> bool:
    queue = facts.knob("cpu.queue_size")
    return queue is not None and queue < 2 and facts.data_wait >= t.DATA_WAIT.value


def _hot(facts: Facts) -> HotSpot | None:
    spots = [s for s in facts.report.hot_spots if s.phase == "data_wait"]
    spot = max(spots, key=lambda s: s.share, default=None)
    return spot if spot is not None and spot.share >= t.HOT_SHARE.value else None


RULES: tuple[Rule, ...] = (
    loader_workers,
    python_transform,
    data_bound,
    queue_too_long,
    queue_too_short,
)
