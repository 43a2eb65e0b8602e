"""What ``hotloop run`` changes for a script, and why: decided from the machine before it starts.

Every change keeps the mathematics; each has a name with which it is left out.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PlanError
from ..machine import Machine, ThreadAffinity
from ..machine.affinity import format_cpus, placement_order
from ..machine.numa import ALLOCATION_POLICIES
from ..units import GIB, MIB, format_bytes
from .settings import Settings

NAMES = (
    "threads", "affinity", "numa", "allocator", "huge-pages", "matmul", "optimizer", "operators",
    "data",
)  # fmt: skip
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# mallopt(3): parameter numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = "-1", "-2", "-3"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for.

    Attributes:
        off: names of changes left out.
        num_threads: threads of each process; ``None``: as many as the machine allows.
        affinity: where threads may run.
        numa_policy: of the memory. numa_nodes: nodes it names; empty: all.
        huge_pages: ask for transparent huge pages.
        num_ranks: processes under torchrun; ``None``: one, without it.
    """

    off: tuple[str, ...] = ()
    num_threads: int | None = None
    affinity: ThreadAffinity = field(default_factory=ThreadAffinity)
    numa_policy: str = "default"
    numa_nodes: tuple[int, ...] = ()
    huge_pages: bool = False
    num_ranks: int | None = None

    def __post_init__(self) -> None:
        for name in self.off:
            if name not in NAMES:
                raise PlanError(f"--off must be of {', '.join(NAMES)}", got=name)
        for flag, value in (("num-threads", self.num_threads), ("nproc", self.num_ranks)):
            if value is not None and value < 1:
                raise PlanError(f"--{flag} must be at least 1", got=value)
        if self.numa_policy not in ALLOCATION_POLICIES:
            raise PlanError(
                f"--numa-policy must be one of {', '.join(ALLOCATION_POLICIES)}",
                got=self.numa_policy,
            )


@dataclass(frozen=True)
class Change:
    """One thing that is changed, or why it is not.

    Attributes:
        name: with which it is left out.
        text: one line.
        made: whether something changes.
        environment: what comes to the same without hotloop, where that can be written so.
    """

    name: str
    text: str
    made: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def decide(
    machine: Machine, options: Options, environ: Mapping[str, str], settings: Settings
) -> tuple[Settings, list[Change]]:
    """The settings of the launched processes, and each change in words.

    Args:
        machine: what there is. options: what is asked for.
        environ: the environment; what the user set there is left as it is.
        settings: to be filled in.

    Raises:
        PlanError: more ranks than CPUs, or CPUs or nodes that are not there.
    """
    ranks = options.num_ranks or 1
    if ranks > machine.usable_cpus:
        raise PlanError(
            f"--nproc must be at most the {machine.usable_cpus} CPUs this process may use",
            got=ranks,
            next_step=f"pass --nproc {machine.usable_cpus}",
        )
    values: dict[str, object] = {"num_ranks": options.num_ranks}
    ways: dict[str, Callable[[], Change]] = {
        "threads": lambda: _threads(machine, options, environ, ranks, values),
        "affinity": lambda: _affinity(machine, options, ranks, values),
        "numa": lambda: _numa(machine, options, ranks, values),
        "allocator": lambda: _allocator(machine, options, environ, ranks, values),
        "huge-pages": lambda: _huge_pages(machine, options, environ, values),
        "matmul": lambda: _switch("matmul", "float32 matrix products by the fastest of torch, "
                                  "oneDNN and hotloop, each shape timed", values),
        "optimizer": lambda: _switch("optimizer", "Adam by torch's fused kernel, other rules by "
                                     "hotloop's, where the script does not choose", values),
        "operators": lambda: _switch("operators", "convolutions and max pooling by the faster of "
                                     "torch and hotloop, each shape timed", values),
        "data": lambda: _switch("data", "batches of recognised data sets by one look-up instead of "
                                "sample by sample, where a DataLoader has no workers", values),
    }  # fmt: skip
    values |= {"matmul": False, "optimizer": False, "operators": False, "data": False}
    changes = [
        Change(name, "left out", made=False) if name in options.off else way()
        for name, way in ways.items()
    ]
    environment = values.pop("environment", {})
    assert isinstance(environment, dict)
    merged: dict[str, Any] = {
        **vars(settings),
        **values,
        "environment": environment,
        "environment_before": {name: environ.get(name) for name in environment},
        "fingerprint": machine.fingerprint(),
        "usable_cpus": machine.usable_cpus,
        "bfloat16": any("bf16" in name for name in machine.isa) if machine.isa else None,
        "lines": tuple(f"{c.name}: {c.text}" for c in changes if c.made),
    }
    return Settings(**merged), changes


def cpu_budget(machine: Machine) -> int:
    """Threads that compute at once: one a core, and no more than the quota pays for."""
    return max(1, min(machine.usable_cpus, machine.usable_cores or machine.usable_cpus))


def _threads(
    machine: Machine,
    options: Options,
    environ: Mapping[str, str],
    ranks: int,
    values: dict[str, object],
) -> Change:
    given = next((name for name in _THREAD_VARIABLES if environ.get(name)), None)
    if given and options.num_threads is None:
        return Change("threads", f"{given}={environ[given]} is yours and stays", made=False)
    budget = cpu_budget(machine)
    if options.affinity.kind == "list":
        budget = min(budget, len(options.affinity.cpu_ids))
    count = options.num_threads or max(1, budget // ranks)
    values["num_threads"] = count
    # Torch would take one for each CPU it may run on; torchrun one for each rank.
    alone = options.num_ranks is None and options.num_threads is None
    if alone and count == len(machine.cpu_ids):
        return Change("threads", f"{count}, as torch takes by itself", made=False)
    reasons = [f"{len(machine.cpu_ids)} CPUs"]
    if machine.usable_cores and machine.usable_cores < len(machine.cpu_ids):
        reasons.append(f"{machine.usable_cores} cores")
    if machine.cpu_quota is not None:
        reasons.append(f"a quota of {machine.cpu_quota:g}")
    if ranks > 1:
        reasons.append(f"{ranks} processes")
    # MKL reads this one too, and a script that sets it means both.
    environment = {_THREAD_VARIABLES[0]: str(count)}
    _environment(values).update(environment)
    why = "as asked" if options.num_threads else _listed(reasons)
    return Change("threads", f"{count} a process ({why})", environment=environment)


def _affinity(machine: Machine, options: Options, ranks: int, values: dict[str, object]) -> Change:
    if ranks > 1 or options.num_ranks is not None:
        order = placement_order(machine, spread=options.affinity.kind == "spread")
        if options.affinity.kind == "list":
            order = options.affinity.cpus(machine, len(options.affinity.cpu_ids))
        if len(order) < ranks:
            raise PlanError("each rank needs a CPU of its own", got=f"{len(order)} CPUs")
        # Neighbours in the order share caches and nodes: each rank takes a run of them.
        bounds = [round(rank * len(order) / ranks) for rank in range(ranks + 1)]
        parts = tuple(order[a:b] for a, b in itertools.pairwise(bounds))
        values["cpu_ids"] = parts
        text = "; ".join(f"rank {i}: {format_cpus(part)}" for i, part in enumerate(parts))
        return Change("affinity", f"CPUs of {text}")
    if options.affinity.kind == "none":
        return Change("affinity", "left to the kernel (--affinity chooses)", made=False)
    count = values.get("num_threads") or cpu_budget(machine)
    if options.affinity.kind == "list":
        count = len(options.affinity.cpu_ids)
    assert isinstance(count, int)
    cpus = options.affinity.cpus(machine, min(count, len(machine.cpu_ids)))
    values["cpu_ids"] = (cpus,)
    return Change("affinity", f"CPUs {format_cpus(cpus)}")


def _numa(machine: Machine, options: Options, ranks: int, values: dict[str, object]) -> Change:
    if options.numa_policy == "default":
        nodes = len(machine.numa_nodes)
        hint = "" if nodes < 2 else f"; {nodes} nodes: try --numa-policy interleave --compare"
        return Change("numa", f"left to the kernel{hint}", made=False)
    known = {node.id for node in machine.numa_nodes}
    wanted = options.numa_nodes or tuple(
        n.id for n in machine.numa_nodes if n.memory_total_bytes != 0
    )
    unknown = [node for node in wanted if node not in known]
    if unknown or (options.numa_policy in ("bind", "interleave") and not wanted):
        listed = ", ".join(map(str, sorted(known))) or "none known"
        raise PlanError(
            "--numa-nodes must name NUMA nodes of this machine",
            got=unknown[0] if unknown else "none",
            next_step=f"choose among: {listed}",
        )
    values["numa_policy"] = options.numa_policy
    values["numa_nodes"] = tuple(_nodes_of(machine, values, rank, wanted) for rank in range(ranks))
    return Change("numa", f"memory policy {options.numa_policy}, nodes {format_cpus(wanted)}")


def _nodes_of(
    machine: Machine, values: dict[str, object], rank: int, wanted: tuple[int, ...]
) -> tuple[int, ...]:
    """A bound rank takes memory from the nodes of its own CPUs."""
    parts = values.get("cpu_ids")
    if values["numa_policy"] != "bind" or not isinstance(parts, tuple) or rank >= len(parts):
        return wanted
    own = tuple(
        node.id
        for node in machine.numa_nodes
        if node.id in wanted and set(node.cpu_ids) & set(parts[rank])
    )
    return own or wanted


def _allocator(
    machine: Machine,
    options: Options,
    environ: Mapping[str, str],
    ranks: int,
    values: dict[str, object],
) -> Change:
    if machine.allocator != "glibc" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return Change("allocator", f"{machine.allocator or 'unknown'} is left as it is", made=False)
    yours = [
        name
        for name in environ
        if name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "malloc" in environ[name])
    ]
    if yours:
        return Change("allocator", f"{yours[0]} is yours and stays", made=False)
    # What is kept back is memory that others do not get: an eighth of what is left, at most 1 GiB.
    room = machine.memory.headroom_bytes
    kept = min(GIB, (room if room is not None else GIB) // ranks // 8)
    if kept < 64 * MIB:
        return Change("allocator", f"left as it is: only {format_bytes(room)} are free", made=False)
    kept = 2 ** math.floor(math.log2(kept))
    pad = min(64 * MIB, kept // 8)
    values["mallopt"] = {
        _M_MMAP_THRESHOLD: kept, _M_TRIM_THRESHOLD: kept, _M_TOP_PAD: pad
    }  # fmt: skip
    return Change(
        "allocator",
        f"tensors up to {format_bytes(kept)} from the heap; up to as much stays when freed",
        environment={
            "MALLOC_MMAP_THRESHOLD_": str(kept),
            "MALLOC_TRIM_THRESHOLD_": str(kept),
            "MALLOC_TOP_PAD_": str(pad),
        },
    )


def _huge_pages(
    machine: Machine, options: Options, environ: Mapping[str, str], values: dict[str, object]
) -> Change:
    name = "THP_MEM_ALLOC_ENABLE"
    if environ.get(name):
        return Change("huge-pages", f"{name}={environ[name]} is yours and stays", made=False)
    if not options.huge_pages:
        return Change(
            "huge-pages", "left to the kernel (--huge-pages asks; measured: no gain)", made=False
        )
    if machine.memory.transparent_huge_pages not in ("madvise", "always"):
        kind = machine.memory.transparent_huge_pages or "unknown"
        return Change("huge-pages", f"the kernel has them off ({kind})", made=False)
    _environment(values)[name] = "1"
    return Change("huge-pages", "tensors of 2 MiB and more on huge pages", environment={name: "1"})


def _switch(name: str, text: str, values: dict[str, object]) -> Change:
    values[name] = True
    return Change(name, text)


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _environment(values: dict[str, object]) -> dict[str, str]:
    found = values.setdefault("environment", {})
    assert isinstance(found, dict)
    return found


def fresh_settings(started_s: float, *, report: bool, report_path: str | None) -> Settings:
    """Settings of this interpreter and process, to be filled in by ``decide``."""
    return Settings(
        pid=os.getpid(), prefix=sys.prefix, started_s=started_s, report=report,
        report_path=report_path,
    )  # fmt: skip
