"""Reports made by hand: a healthy one, and what is changed in it."""

import dataclasses

from hotloop.machine import Machine, MachineMemory
from hotloop.machine.probe.topology import Core, NumaNode
from hotloop.monitor import (
    CacheStats,
    CoreUse,
    CpuStats,
    MemoryStats,
    PerformanceReport,
    StepTimes,
    Work,
)
from hotloop.plan import Plan

GIB = 2**30


def machine(cpus=4, *, cores=None, nodes=1, isa=(), huge_pages="madvise", quota=None):
    """A machine of so many CPUs, one a core unless ``cores`` says otherwise."""
    cores = cores or cpus
    each = cpus // cores
    per_node = cpus // nodes
    return Machine(
        usable_cpus=cpus,
        cpu_ids=tuple(range(cpus)),
        cpu_quota=quota,
        cores=tuple(Core(tuple(range(c * each, (c + 1) * each)), None, 0, 0) for c in range(cores)),
        numa_nodes=tuple(
            NumaNode(n, tuple(range(n * per_node, (n + 1) * per_node)), 64 * GIB, (10, 21))
            for n in range(nodes)
        ),
        isa=isa,
        memory=MachineMemory(total_bytes=16 * GIB, transparent_huge_pages=huge_pages),
    )


def report(cpus=4, *, plan=True, cpu=None, memory=None, step=None, work=None, knobs=None, **parts):
    """Ten seconds of a healthy run with as many threads as CPUs, and what differs from it."""
    values = {"cpu.num_threads": cpus, "step.precision": "float32", **(knobs or {})}
    stats = CpuStats(
        user_s=9.5 * cpus,
        system_s=0.1,
        children_s=0.0,
        cpu_fraction=0.96,
        usable_cpus=cpus,
        cores=tuple(
            CoreUse(cpu=c, user=0.95, system=0.01, iowait=0.0, steal=0.0, idle=0.04, own=0.95)
            for c in range(cpus)
        ),
        busy_threads=cpus,
        run_delay_s=0.1,
        others_s=0.1,
        steal_s=0.0,
        migrations=20,
        child_processes=0,
    )
    made = PerformanceReport(
        duration_s=10.0,
        cpu=dataclasses.replace(stats, **(cpu or {})),
        memory=dataclasses.replace(
            MemoryStats(
                resident_bytes=GIB,
                peak_resident_bytes=GIB,
                minor_faults=1000,
                major_faults=0,
                anonymous_bytes=GIB // 2,
                huge_page_share=0.0,
                swap_bytes=0,
                swap_in_bytes=0,
                limit_bytes=16 * GIB,
            ),
            **(memory or {}),
        ),
        cache=CacheStats(source="modelled"),
        step=dataclasses.replace(
            StepTimes(
                data_wait_s=0.1,
                compute_s=9.0,
                steps=1000,
                calls=1000,
                samples=64_000,
                median_call_s=9e-3,
                checkpoints=0,
            ),
            **(step or {}),
        ),
        work=dataclasses.replace(
            Work(
                batch_size=64,
                steps_per_call=1,
                num_threads=cpus,
                path="compiled",
                precision="float32",
                step_bytes=2**27,
                flop_per_step=2e9,
                ceiling_flop_per_s=4e11,
            ),
            **(work or {}),
        ),
        plan=Plan().replace(values).to_dict() if plan else {},
    )
    return dataclasses.replace(made, **parts)
