"""``PerformanceReport``: what a run did to the machine, as plain frozen values.

Every part has ``to_dict`` and ``from_dict`` (plain JSON types), so that suggestions and renderers
can be tested from numbers made by hand. What is not known is ``None`` or an empty tuple.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .record import Record

# Raised when a key changes its meaning; new keys do not raise it.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CoreUse(Record):
    """One logical CPU over the interval, as shares of it (0 to 1).

    Attributes:
        cpu: its number.
        user, system, iowait, steal, idle: by everybody; ``steal``: taken by the hypervisor.
        own: by this process, from where its threads were seen; ``None``: not known.
        frequency_hz: mean of what was seen; ``None``: the kernel does not tell.
    """

    cpu: int
    user: float | None = None
    system: float | None = None
    iowait: float | None = None
    steal: float | None = None
    idle: float | None = None
    own: float | None = None
    frequency_hz: float | None = None


@dataclass(frozen=True, kw_only=True)
class ThreadUse(Record):
    """One thread of this process over the interval.

    Attributes:
        thread: the kernel's number. name: as the kernel has it.
        user_s, system_s: CPU seconds. run_delay_s: it could run and waited for a CPU.
        cpu: where it was seen last. cpu_ids: where it may run.
    """

    thread: int
    name: str
    user_s: float
    system_s: float
    run_delay_s: float | None = None
    cpu: int | None = None
    cpu_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OtherProcess(Record):
    """A process beside this one and its children that used our CPUs.

    Attributes:
        process: the kernel's number. name: as the kernel has it. cpu_s: CPU seconds over the
            interval. cpu: where it was seen last; ``None``: not told.
    """

    process: int
    name: str
    cpu_s: float
    cpu: int | None = None


@dataclass(frozen=True, kw_only=True)
class CpuStats(Record):
    """Processors over the interval.

    Attributes:
        user_s, system_s: CPU seconds of all threads of this process (children apart).
        children_s: CPU seconds of child processes alive or waited for, such as a loader's workers.
        cpu_fraction: CPU seconds of this process and its children over the interval times
            ``usable_cpus``.
        usable_cpus, cpu_quota: of the machine, as ``Machine`` has them.
        cores: CPUs this process may run on. threads: those that ran, the busiest first.
        busy_threads: threads that used at least a twentieth of the interval.
        run_delay_s: threads could run and waited for a CPU, in all; ``None``: not told.
        others_s: CPU seconds of other processes on ``cores``; ``None``: not told.
        steal_s: CPU seconds on ``cores`` taken by the hypervisor.
        periods, throttled_periods, throttled_s: of the control group's quota; ``None``: no quota.
        voluntary_switches, involuntary_switches: context switches.
        migrations: changes of CPU; ``None``: not told.
        frequency_hz: mean over ``cores``. max_frequency_hz: what they may reach.
        pressure_some: share of the interval in which some task waited for a CPU (PSI).
        others: the other processes that used most, the busiest first; empty: none seen.
        child_processes: most children at a time; ``None``: not told.
    """

    user_s: float
    system_s: float
    children_s: float | None = None
    cpu_fraction: float | None = None
    usable_cpus: int | None = None
    cpu_quota: float | None = None
    cores: tuple[CoreUse, ...] = ()
    threads: tuple[ThreadUse, ...] = ()
    busy_threads: int | None = None
    run_delay_s: float | None = None
    others_s: float | None = None
    steal_s: float | None = None
    periods: int | None = None
    throttled_periods: int | None = None
    throttled_s: float | None = None
    voluntary_switches: int | None = None
    involuntary_switches: int | None = None
    migrations: int | None = None
    frequency_hz: float | None = None
    max_frequency_hz: float | None = None
    pressure_some: float | None = None
    others: tuple[OtherProcess, ...] = ()
    child_processes: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryStats(Record):
    """Memory over the interval.

    Attributes:
        resident_bytes: at its end. peak_resident_bytes: highest since the peak was reset.
        minor_faults, major_faults: page faults; major ones waited for storage.
        huge_page_bytes: of resident anonymous memory. huge_page_share: over ``anonymous_bytes``.
        numa_local_share: pages on the nodes this process may run on, over all; ``None``: not told.
        pool_hits, pool_misses: buffers lent at once, and waits for one.
        pool_buffers, pool_high_water: buffers there are, and most lent at a time.
        arena_peak_bytes, arena_capacity_bytes: of the tensor arena; ``None``: not used.
        swap_bytes: of this process, swapped out at the end. swap_in_bytes, swap_out_bytes: of the
            machine, over the interval.
        limit_bytes: least of the control group's limit and the machine's memory.
        available_bytes: memory that could still be had at the end (of the machine).
        pressure_some: share of the interval in which some task waited for memory (PSI).
    """

    resident_bytes: int | None = None
    peak_resident_bytes: int | None = None
    minor_faults: int | None = None
    major_faults: int | None = None
    anonymous_bytes: int | None = None
    huge_page_bytes: int | None = None
    huge_page_share: float | None = None
    numa_local_share: float | None = None
    pool_hits: int | None = None
    pool_misses: int | None = None
    pool_buffers: int | None = None
    pool_high_water: int | None = None
    arena_peak_bytes: int | None = None
    arena_capacity_bytes: int | None = None
    swap_bytes: int | None = None
    swap_in_bytes: int | None = None
    swap_out_bytes: int | None = None
    limit_bytes: int | None = None
    available_bytes: int | None = None
    pressure_some: float | None = None


@dataclass(frozen=True, kw_only=True)
class CacheLevel(Record):
    """One level of cache against what a step touches.

    Attributes:
        level: 1, 2, 3. size_bytes: of one cache of the level. shared_by_cpus: that use one.
        working_set_bytes: bytes that compete for one cache of it; ``None``: not known.
        fits: whether they fit.
        references, misses: of the level, counted; ``None``: not counted.
    """

    level: int
    size_bytes: int | None
    shared_by_cpus: int | None = None
    working_set_bytes: int | None = None
    fits: bool | None = None
    references: int | None = None
    misses: int | None = None


@dataclass(frozen=True, kw_only=True)
class CacheStats(Record):
    """Caches: counted where the processor lets us count, otherwise modelled, always labelled.

    Attributes:
        source: ``"measured"``: hardware counters; ``"modelled"``: working set against sizes.
        reason: why it is not measured; ``None`` when it is.
        levels: by level.
        instructions, cycles, cache_references, cache_misses: counted over the interval.
    """

    source: Literal["measured", "modelled"]
    reason: str | None = None
    levels: tuple[CacheLevel, ...] = ()
    instructions: int | None = None
    cycles: int | None = None
    cache_references: int | None = None
    cache_misses: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepTimes(Record):
    """Where the interval went, in seconds; phases do not overlap.

    Attributes:
        data_wait_s: the step waited for a batch. compute_s: forward, backward, and what cannot be
            told apart from them. synchronize_s: workers or hosts waited for each other.
        update_s: optimizer; ``None``: one with ``compute_s`` (a compiled step).
        checkpoint_s: writing checkpoints. other_s: evaluation, preparation and the like.
        steps: optimizer steps. calls: calls of the step; several steps may be one call.
        samples: trained. samples_per_s: over data wait, compute, synchronize and update.
        median_call_s, slowest_call_s: of one call; ``None``: not recorded.
    """

    data_wait_s: float = 0.0
    compute_s: float = 0.0
    synchronize_s: float = 0.0
    update_s: float | None = None
    checkpoint_s: float = 0.0
    other_s: float = 0.0
    steps: int = 0
    calls: int = 0
    samples: int = 0
    samples_per_s: float | None = None
    median_call_s: float | None = None
    slowest_call_s: float | None = None
    checkpoints: int | None = None

    @property
    def train_s(self) -> float:
        """Data wait, compute, synchronize and update."""
        return self.data_wait_s + self.compute_s + self.synchronize_s + (self.update_s or 0.0)


@dataclass(frozen=True, kw_only=True)
class WorkerUse(Record):
    """One worker of a data-parallel step.

    Attributes:
        worker: its number. chunks: run, ``stolen`` of them another's. busy_s: running them.
        wait_s: for the others. update_s: updating its share of the weights.
        rate_per_s: chunks a second while busy.
        slowdown: rate over the best it showed, 1 at most; ``None``: not known.
        cpu: where it is pinned; ``None``: nowhere.
    """

    worker: int
    chunks: int = 0
    stolen: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    update_s: float = 0.0
    rate_per_s: float | None = None
    slowdown: float | None = None
    cpu: int | None = None


@dataclass(frozen=True, kw_only=True)
class Work(Record):
    """What was run, as far as suggestions need it.

    Attributes:
        batch_size: samples a step. steps_per_call: steps in one call of the step.
        num_threads: threads inside an operation, as torch has it.
        path: ``"compiled"``, ``"compiled gradients"``, ``"plain"``, ...; ``None``: not hotloop's.
        path_reason: why. precision: of forward and backward. precision_reason: what the probe of
            precision ``"auto"`` found; ``None``: nothing was probed.
        memory_format: of four-dimensional inputs: ``"contiguous"``, ``"channels_last"``; ``None``:
            there are none.
        operations: longest operations of a step, as ``TrainReport.operations`` has them.
        flop_per_step, step_bytes: of one step; step_bytes: weights, gradients, optimizer state,
            activations and batch, each once.
        batch_bytes: of one batch.
        loader_workers: processes or threads that prepare data; ``None``: not known.
        queue_bytes: batches prepared ahead, when full.
        transform_s: seconds inside a transform or gathering, per batch; ``None``: not known.
        learning_rate: of the first group.
        ceiling_flop_per_s, ceiling_bytes_per_s: measured rates of the machine at ``num_threads``
            (float32 products, memory); ceiling_bfloat16_flop_per_s: of bfloat16 products.
        parameter_bytes: of the model. has_convolutions: whether it convolves images.
        num_samples: of the data, an epoch.
    """

    batch_size: int | None = None
    steps_per_call: int | None = None
    num_threads: int | None = None
    path: str | None = None
    path_reason: str | None = None
    precision: str | None = None
    precision_reason: str | None = None
    memory_format: str | None = None
    operations: tuple[dict[str, Any], ...] = ()
    flop_per_step: float | None = None
    step_bytes: int | None = None
    batch_bytes: int | None = None
    loader_workers: int | None = None
    queue_bytes: int | None = None
    transform_s: float | None = None
    learning_rate: float | None = None
    ceiling_flop_per_s: float | None = None
    ceiling_bytes_per_s: float | None = None
    ceiling_bfloat16_flop_per_s: float | None = None
    parameter_bytes: int | None = None
    has_convolutions: bool | None = None
    num_samples: int | None = None


@dataclass(frozen=True, kw_only=True)
class HotSpot(Record):
    """A function of the user's where a thread was often seen.

    Attributes:
        phase: ``"data_wait"`` (the step was waiting for a batch) or ``"step"``.
        function, file, line: the innermost frame that is neither Python's, an installed package's
            nor hotloop's; line: of its ``def``.
        share: of the looks of that phase, 0 to 1. thread: name of the Python thread.
    """

    phase: Literal["data_wait", "step"]
    function: str
    file: str
    line: int
    share: float
    thread: str = "MainThread"


@dataclass(frozen=True, kw_only=True)
class Sample(Record):
    """One look of the sampling thread, for charts.

    Attributes:
        t_s: seconds since the monitor began. resident_bytes: then.
        cpu_fraction: CPU seconds since the last look over the time times usable CPUs.
        samples_per_s: trained since the last look.
    """

    t_s: float
    resident_bytes: int | None = None
    cpu_fraction: float | None = None
    samples_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class PerformanceReport(Record):
    """All of it, for one interval.

    Attributes:
        duration_s: length of the interval.
        cpu, memory, cache, step: its parts.
        workers: of a data-parallel step; empty: there are none.
        work: what was run. plan: every knob as resolved, ``Plan.to_dict``; empty: not hotloop's.
        samples: a few hundred at most, evenly spread.
        hot_spots: where Python code spent its time, the hottest first.
        sampling_s: CPU seconds the monitor's own thread took.
        notes: what could not be read and why; one line each.
    """

    duration_s: float
    cpu: CpuStats
    memory: MemoryStats
    cache: CacheStats
    step: StepTimes
    workers: tuple[WorkerUse, ...] = ()
    work: Work = field(default_factory=Work)
    plan: dict[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    hot_spots: tuple[HotSpot, ...] = ()
    sampling_s: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"format": FORMAT, **super().to_dict()}
