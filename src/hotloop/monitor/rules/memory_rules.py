"""Memory: swap, the limit, page faults, huge pages, NUMA."""

from __future__ import annotations

from ...units import format_bytes, format_share
from ..optimization import Change, Optimization
from . import thresholds as t
from .facts import Facts, Rule, found, gain_of

# A page read back from swap on a solid-state disk; the pressure counter tells better where it is.
_SWAP_IN_S = 100e-6


def swap(facts: Facts) -> Optimization | None:
    """Pages of the run come back from swap."""
    memory = facts.report.memory
    if not memory.swap_in_bytes or not (memory.major_faults or memory.swap_bytes):
        return None
    lost = memory.pressure_some
    source = "share of the time in which tasks waited for memory (PSI)"
    if lost is None:
        lost = (memory.major_faults or 0) * _SWAP_IN_S / facts.duration_s
        source = "100 us for each page read back"
    return found(
        "swap",
        f"memory is full: {format_bytes(memory.swap_in_bytes)} were read back from swap",
        "memory.swap_in_bytes",
        memory.swap_in_bytes,
        t.Threshold(0, "Linux, filesystems/proc.rst: pswpin counts pages the run waited for"),
        _less_memory(facts),
        gain=gain_of(lost),
        gain_source=source,
    )


def memory_limit(facts: Facts) -> Optimization | None:
    """The peak comes close to the limit, past which the kernel kills."""
    memory = facts.report.memory
    if not memory.limit_bytes or not memory.peak_resident_bytes:
        return None
    share = memory.peak_resident_bytes / memory.limit_bytes
    if share < t.MEMORY_LIMIT.value:
        return None
    return found(
        "memory-limit",
        f"the peak of {format_bytes(memory.peak_resident_bytes)} is {format_share(share)} of the "
        f"limit, {format_bytes(memory.limit_bytes)}",
        "memory.peak_resident_bytes / memory.limit_bytes",
        share,
        t.MEMORY_LIMIT,
        _less_memory(facts),
    )


def page_faults(facts: Facts) -> Optimization | None:
    """The allocator gives memory back each step, and the kernel clears it anew."""
    report = facts.report
    faults = report.memory.minor_faults
    if not faults:
        return None
    threads = max(1, min(report.cpu.busy_threads or 1, facts.cpus))
    lost = min(faults * t.FAULT_S.value, report.cpu.system_s) / (facts.duration_s * threads)
    if lost < t.PAGE_FAULTS.value:
        return None
    a_step = f"{faults / report.step.steps:,.0f} a step" if report.step.steps else f"{faults:,}"
    change = Change(
        command="MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 "
        "MALLOC_TOP_PAD_=268435456 python ...  (or: hotloop run)"
    )
    if facts.has_plan and facts.knob("memory.tensor_arena") == "never":
        change = Change(plan={"memory.tensor_arena": "try"})
    return found(
        "page-faults",
        f"page faults, {a_step}: memory is given back and taken anew",
        "memory.minor_faults and cpu.system_s, as a share of the threads' time",
        lost,
        t.PAGE_FAULTS,
        change,
        text=f"{faults:,} faults took {format_share(lost)} of the time",
        gain=gain_of(lost),
        gain_source=f"time in the kernel, {t.FAULT_S.value * 1e6:.1f} us a fault at most "
        f"({t.FAULT_S.source})",
    )


def huge_pages(facts: Facts) -> Optimization | None:
    """Much memory in small pages, where the kernel has large ones on request."""
    memory = facts.report.memory
    share = memory.huge_page_share
    size = facts.report.work.step_bytes
    if size is None and (memory.anonymous_bytes or 0) >= 4 * t.HUGE_PAGES_BYTES.value:
        size = memory.anonymous_bytes  # Libraries and data are in it too, so much more is asked.
    if size is None or share is None or size < t.HUGE_PAGES_BYTES.value or share >= 0.5:
        return None
    if facts.machine.memory.transparent_huge_pages not in ("madvise", "always"):
        return None
    if facts.has_plan and facts.knob("memory.huge_pages") != "never":
        return None
    change = Change(command="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python ...")
    if facts.has_plan:
        change = Change(plan={"memory.huge_pages": "try"})
    return found(
        "huge-pages",
        f"a step touches {format_bytes(size)}; {format_share(share)} of memory is on huge pages",
        "work.step_bytes",
        size,
        t.HUGE_PAGES_BYTES,
        change,
        kind="opportunity",
    )


def numa(facts: Facts) -> Optimization | None:
    """Pages lie on nodes whose CPUs the run does not use."""
    share = facts.report.memory.numa_local_share
    nodes = facts.machine.numa_nodes
    if share is None or len(nodes) < 2 or share >= t.NUMA_LOCAL.value:
        return None
    usable = set(facts.machine.cpu_ids)
    local = [node.id for node in nodes if usable & set(node.cpu_ids)]
    far = max((d for node in nodes for d in node.distances), default=10)
    change = Change(command=f"numactl --membind={','.join(map(str, local))} python ...")
    if facts.has_plan and local:
        change = Change(plan={"numa.node_assignments": local, "numa.allocation_policy": "bind"})
    return found(
        "numa",
        f"{format_share(1 - share)} of the memory lies on nodes of other CPUs",
        "memory.numa_local_share",
        share,
        t.NUMA_LOCAL,
        change,
        gain=(1 - share) * (far / 10 - 1),
        gain_source="remote share times the firmware's distance over local (SLIT), if memory-bound",
    )


def _less_memory(facts: Facts) -> Change:
    """The largest part that can be had with less memory and the same results."""
    work = facts.report.work
    limit = facts.report.memory.limit_bytes or 0
    if facts.has_plan:
        if work.queue_bytes and work.queue_bytes > 0.2 * limit:
            return Change(plan={"cpu.queue_size": 4})
        micro = facts.knob("memory.micro_batch_size") or work.batch_size
        if micro and micro > 1:
            return Change(plan={"memory.micro_batch_size": max(1, micro // 4)})
    return Change(command="use a smaller batch, or micro-batches with gradient accumulation")


RULES: tuple[Rule, ...] = (swap, memory_limit, page_faults, huge_pages, numa)
