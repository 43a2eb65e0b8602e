"""``Machine``: what this machine is, as far as this process may use it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from .probe.accelerators import Accelerator, read_accelerators
from .probe.allocator import read_allocator
from .probe.caches import Cache, read_caches
from .probe.cgroup import read_cgroup
from .probe.isa import read_cpuinfo, read_isa
from .probe.memory import MachineMemory, read_memory
from .probe.system import read_architecture, read_is_virtual, read_kernel, read_platform
from .probe.tee import read_enclave_tools, read_tee, read_tee_hosted
from .probe.topology import Core, NumaNode, count_sockets, read_cores, read_nodes, read_online
from .probe.tree import Tree, parse_cpu_list, parse_fields

if TYPE_CHECKING:
    from .ceilings import Ceilings


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine as seen by one process. What is not known is ``None`` or an empty tuple.

    Attributes:
        usable_cpus: threads that can run at once: at least 1, at most the CPUs of ``cpu_ids``
            and the whole CPUs of ``cpu_quota``.
        cpu_ids: logical CPUs this process may run on (affinity mask, cpuset, online).
        cpu_quota: CPU seconds per second that the control groups allow; ``None``: no limit.
        logical_cpus: logical CPUs online in the machine.
        physical_cores, sockets: of the machine.
        cores: physical cores by socket, node and first CPU.
        numa_nodes: NUMA nodes by number.
        caches: every cache once, by level.
        isa: instruction sets that matter for kernels, see ``probe/isa.py``.
        allocator: ``"glibc"``, ``"musl"``, ``"jemalloc"``, ``"tcmalloc"`` or ``"mimalloc"``.
        tee: ``"sgx"``, ``"tdx"``, ``"sev-snp"``, ``"nitro"`` or ``"none"``: where this process
            runs.
        tee_hosted: the kinds that this machine offers to start.
        enclave_tools: what can isolate a run or vouch for it without them, such as
            ``"bubblewrap"`` or ``"TPM 2.0"``.
        accelerators: devices that a driver shows.
        kernel: release of the kernel. architecture: as ``uname -m``. cpu_model: processor name.
        is_virtual: whether a hypervisor is underneath. platform: the firmware's name for it.
    """

    usable_cpus: int = 1
    cpu_ids: tuple[int, ...] = ()
    cpu_quota: float | None = None
    cpu_model: str | None = None
    architecture: str | None = None
    logical_cpus: int | None = None
    physical_cores: int | None = None
    sockets: int | None = None
    cores: tuple[Core, ...] = ()
    numa_nodes: tuple[NumaNode, ...] = ()
    caches: tuple[Cache, ...] = ()
    isa: tuple[str, ...] = ()
    memory: MachineMemory = field(default_factory=MachineMemory)
    allocator: str | None = None
    tee: str | None = None
    tee_hosted: tuple[str, ...] = ()
    enclave_tools: tuple[str, ...] = ()
    accelerators: tuple[Accelerator, ...] = ()
    kernel: str | None = None
    is_virtual: bool | None = None
    platform: str | None = None

    @classmethod
    def probe(cls, root: str | Path = "/") -> Machine:
        """Read the machine below ``root``; never fails, whatever is missing or damaged.

        Args:
            root: ``"/"`` for this machine, or a folder with copies of another machine's files.
        """
        tree = Tree(root)
        cpuinfo = read_cpuinfo(tree)
        limits = read_cgroup(tree)
        online = read_online(tree, cpuinfo)
        nodes = read_nodes(tree)
        cores = read_cores(tree, online, nodes, cpuinfo)
        cpu_ids = _usable_cpu_ids(tree, online, limits.cpuset_cpu_ids)
        return cls(
            usable_cpus=_count_usable(cpu_ids, limits.cpu_quota),
            cpu_ids=cpu_ids,
            cpu_quota=limits.cpu_quota,
            cpu_model=cpuinfo.model,
            architecture=read_architecture(tree, cpuinfo),
            logical_cpus=len(online) or None,
            physical_cores=len(cores) or None,
            sockets=count_sockets(cores),
            cores=cores,
            numa_nodes=nodes,
            caches=read_caches(tree, online),
            isa=read_isa(cpuinfo),
            memory=read_memory(tree, limits),
            allocator=read_allocator(tree),
            tee=read_tee(tree, cpuinfo),
            tee_hosted=read_tee_hosted(tree),
            enclave_tools=read_enclave_tools(tree),
            accelerators=read_accelerators(tree),
            kernel=read_kernel(tree),
            is_virtual=read_is_virtual(tree, cpuinfo),
            platform=read_platform(tree),
        )

    @property
    def line_bytes(self) -> int | None:
        """Cache line size of the data caches; the largest where they differ."""
        lines = {c.line_bytes for c in self.caches if c.kind != "instruction"} - {None}
        return max((line for line in lines if line is not None), default=None)

    @property
    def last_level_caches(self) -> tuple[Cache, ...]:
        """The caches of the highest level; empty when unknown."""
        last = max((cache.level for cache in self.caches), default=0)
        return tuple(cache for cache in self.caches if cache.level == last)

    @property
    def usable_cores(self) -> int | None:
        """Physical cores with at least one CPU of ``cpu_ids``, ``None`` when unknown."""
        usable = set(self.cpu_ids)
        return sum(1 for core in self.cores if usable & set(core.cpu_ids)) or None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only: the fields, with ``line_bytes`` and ``fingerprint`` beside."""
        document = dataclasses.asdict(self)
        document["line_bytes"] = self.line_bytes
        document["fingerprint"] = self.fingerprint()
        plain: dict[str, Any] = json.loads(json.dumps(document))
        return plain

    def fingerprint(self) -> str:
        """16 hex digits of what determines speed: processor, caches, usable CPUs and cores.

        Memory sizes are left out: virtual machines grow and shrink while they run.
        """
        usable = set(self.cpu_ids)
        parts = {
            "architecture": self.architecture,
            "cpu_model": self.cpu_model,
            "isa": self.isa,
            "usable_cpus": self.usable_cpus,
            "usable_cores": [
                (core.kind, core.node, core.socket, len(usable & set(core.cpu_ids)))
                for core in self.cores
                if usable & set(core.cpu_ids)
            ],
            "logical_cpus": self.logical_cpus,
            "numa_nodes": len(self.numa_nodes),
            "caches": [dataclasses.astuple(cache) for cache in self.caches],
            "transparent_huge_pages": self.memory.transparent_huge_pages,
            "is_virtual": self.is_virtual,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def ceilings(
        self, *, max_age_s: float | None = 30 * 86_400.0, use_cache: bool = True
    ) -> Ceilings:
        """What this machine can do, measured in under 20 s or read from the cache. Loads torch.

        Args:
            max_age_s: measure again when the cached figures are older; ``None``: any age.
            use_cache: ``False``: measure now, and store the result.

        Raises:
            RunError: they must be measured, and ``hotloop.measure`` was not imported.
        """
        known = self.cached_ceilings(max_age_s=max_age_s) if use_cache else None
        if known is None:
            if _measure_ceilings is None:
                raise RunError(
                    "hotloop.measure must be imported to measure ceilings",
                    next_step="take hotloop.Machine, which brings it",
                )
            known = _measure_ceilings(self)
            from . import ceilings_cache

            ceilings_cache.store(self.fingerprint(), known)
        return known

    def cached_ceilings(self, *, max_age_s: float | None = 30 * 86_400.0) -> Ceilings | None:
        """What ``ceilings`` measured before; ``None`` where it would have to measure."""
        from . import ceilings_cache

        return ceilings_cache.load(self.fingerprint(), max_age_s=max_age_s)


_measure_ceilings: Callable[[Machine], Ceilings] | None = None


def ceilings_measured_by(measure: Callable[[Machine], Ceilings]) -> None:
    """Have ``Machine.ceilings`` call this: ``hotloop.measure``, right of this room, says so."""
    global _measure_ceilings
    _measure_ceilings = measure


def _usable_cpu_ids(
    tree: Tree, online: tuple[int, ...], cpuset: tuple[int, ...] | None
) -> tuple[int, ...]:
    status = parse_fields(tree.text("/proc/self/status"))
    mask = parse_cpu_list(status.get("Cpus_allowed_list"))
    allowed = set(mask or online)
    # The kernel keeps the mask inside the cpuset and the online CPUs. A set that contradicts it
    # was read from the wrong place (a container that shows the host's files), so the mask wins.
    for narrower in (set(online), set(cpuset or ())):
        allowed = allowed & narrower or allowed
    if not allowed and tree.is_live:  # systems without /proc
        allowed = set(range(os.cpu_count() or 0))
    return tuple(sorted(allowed))


def _count_usable(cpu_ids: tuple[int, ...], quota: float | None) -> int:
    whole = len(cpu_ids) if quota is None else min(len(cpu_ids), math.floor(quota))
    return max(1, whole)
