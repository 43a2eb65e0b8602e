"""``CacheStats``: counted by the hardware, or a step's working set against the sizes of caches."""

from __future__ import annotations

from collections.abc import Mapping

from ..machine import Machine
from .metrics import CacheLevel, CacheStats

_EVENT_OF_LEVEL = {1: "l1"}


def cache_stats(
    machine: Machine,
    *,
    counted: Mapping[str, int] | None,
    reason: str | None,
    step_bytes: int | None,
    num_threads: int | None,
) -> CacheStats:
    """The caches of ``machine`` against what a step touches.

    The model: threads share a step's bytes evenly, and a cache holds the shares of the threads that
    run below it, at most one a CPU it serves. What fits is read from memory once and stays for the
    next step; what does not comes from the level below each time.

    Args:
        counted: hardware counters over the interval, ``HardwareCounters.read``; ``None``: none.
        reason: why there are none.
        step_bytes: weights, gradients, optimizer state, activations and batch, each once.
        num_threads: that work on a step.
    """
    levels = []
    last = max((c.level for c in machine.caches), default=0)
    usable = set(machine.cpu_ids)
    for level in sorted({c.level for c in machine.caches}):
        here = [c for c in machine.caches if c.level == level and c.kind != "instruction"]
        here = [c for c in here if not usable or usable & set(c.shared_by)] or here
        sizes = [c.size_bytes for c in here if c.size_bytes is not None]
        size = min(sizes, default=None)
        shared_by = max((len(c.shared_by) for c in here), default=0) or None
        held = None
        if step_bytes is not None and num_threads and shared_by:
            held = int(step_bytes * min(num_threads, shared_by) / num_threads)
        event = _EVENT_OF_LEVEL.get(level, "ll" if level == last else None)
        counts = counted or {}
        levels.append(
            CacheLevel(
                level=level,
                size_bytes=size,
                shared_by_cpus=shared_by,
                working_set_bytes=held,
                fits=None if held is None or size is None else held <= size,
                references=counts.get(f"{event}_references"),
                misses=counts.get(f"{event}_misses"),
            )
        )
    counts = counted or {}
    return CacheStats(
        source="measured" if counted else "modelled",
        reason=None if counted else reason,
        levels=tuple(levels),
        instructions=counts.get("instructions"),
        cycles=counts.get("cycles"),
        cache_references=counts.get("cache_references"),
        cache_misses=counts.get("cache_misses"),
    )
