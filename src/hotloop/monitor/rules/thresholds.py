"""What rules hold metrics against, and where each figure comes from."""

from __future__ import annotations

from dataclasses import dataclass

_PLANTED = "benchmarks/results/planted.json"


@dataclass(frozen=True)
class Threshold:
    """A figure and its source: a record of this project, or documentation."""

    value: float
    source: str


# Shares of threads' time spent waiting for a CPU.
RUN_DELAY = Threshold(0.10, f"{_PLANTED}: undisturbed healthy runs below 0.08, planted above 0.24")
THROTTLED = Threshold(0.05, "Linux, scheduler/sched-bwc.rst: a throttled group runs nothing")
STEAL = Threshold(0.05, f"{_PLANTED}: healthy runs at most 0.014 a second")
OTHERS = Threshold(0.15, f"{_PLANTED}: undisturbed runs below 0.08 a second")
FREQUENCY = Threshold(0.80, "Linux, admin-guide/pm/cpufreq.rst: cpuinfo_max_freq is reachable")
MIGRATIONS_PER_S = Threshold(
    100.0, f"{_PLANTED}: healthy runs at most 10, 16 threads on 2 CPUs 700"
)
NUMA_LOCAL = Threshold(0.90, "Linux, admin-guide/mm/numa_memory_policy.rst: local by default")
# Shares of the training time.
DATA_WAIT = Threshold(0.10, f"{_PLANTED}: batches that lie ready below 0.05, planted above 0.4")
CHECKPOINT = Threshold(0.05, "Young 1974, Daly 2006: rarer than its cost asks for is cheaper")
CHECKPOINT_GOAL = Threshold(0.01, "the rule's aim: one hundredth of the time")
PAGE_FAULTS = Threshold(0.05, f"{_PLANTED}: runs in the arena near 0.01, the storm at 0.3")
OVERHEAD = Threshold(0.90, f"{_PLANTED}: batch 64 at 0.83, batch 4 at 0.93")
SYNCHRONIZE = Threshold(0.20, "docs/notes/workers.md: two workers wait for less")
SLOW_WORKER = Threshold(0.80, "docs/monitor.md: 0.98 undisturbed, 0.56 beside a neighbour")
# Of memory.
MEMORY_LIMIT = Threshold(
    0.90, "Linux, admin-guide/cgroup-v2.rst: past memory.max comes the OOM killer"
)
QUEUE_SHARE = Threshold(
    0.05, "a queue needs to bridge the jitter of a batch, not an epoch: docs/data.md"
)
HUGE_PAGES_BYTES = Threshold(
    256 * 2**20, "Linux, admin-guide/mm/transhuge.rst: TLB reach of 4 KiB pages"
)
HOT_SHARE = Threshold(0.50, "the greater part of the looks")
# Seconds of one minor fault of a 4 KiB page, zeroing and giving it back included, in a virtual
# machine; on bare metal less. The rule takes no more than the time spent in the kernel.
FAULT_S = Threshold(3.0e-6, "benchmarks/results/thresholds.json")
# Batch sizes to which tiny ones are raised.
GOOD_BATCH = Threshold(64, "the guide's 32 to 64 on a CPU, section 5.3")
