"""Threads on the CPUs of chosen NUMA nodes and memory from those nodes; undone on leaving."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import PlanError
from .affinity import pinned, pinned_thread
from .mempolicy import MODES, MemoryPolicy, get_memory_policy, set_memory_policy

if TYPE_CHECKING:
    from .machine import Machine

ALLOCATION_POLICIES = ("default", "local", "bind", "interleave")


@contextlib.contextmanager
def memory_policy(policy: str, nodes: Sequence[int] = ()) -> Iterator[None]:
    """Take new pages of the calling thread, and of threads it starts, by this policy.

    Args:
        policy: ``"default"`` (leave it as it is), ``"local"`` (the node that runs the thread),
            ``"bind"`` (only these nodes) or ``"interleave"`` (these nodes in turn).
        nodes: NUMA nodes; for bind and interleave at least one.

    Raises:
        PlanError: an unknown policy, or bind or interleave without nodes.
        RunError: the kernel refuses.
    """
    _check_policy(policy)
    if policy == "default":
        yield
        return
    takes_nodes = policy in ("bind", "interleave")
    if takes_nodes and not nodes:
        raise _nodes_missing(policy)
    before = get_memory_policy()
    set_memory_policy(MemoryPolicy(MODES[policy], tuple(sorted(set(nodes))) if takes_nodes else ()))
    try:
        yield
    finally:
        set_memory_policy(before)


@dataclass
class NumaBinding:
    """An applied placement. Leaving it as a context manager, or ``restore()``, undoes it.

    Attributes:
        node_assignments: NUMA node of worker 0, 1, ...; workers past the end start over.
        allocation_policy: see ``memory_policy``.
        cpus_of_node: usable CPUs of each assigned node.
        memory_nodes: nodes that bind and interleave take pages from.
    """

    node_assignments: tuple[int, ...]
    allocation_policy: str
    cpus_of_node: dict[int, tuple[int, ...]]
    memory_nodes: tuple[int, ...]
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def apply(self) -> None:
        """Confine all threads of the process to the assigned nodes and set the caller's policy.

        A policy belongs to a thread and is inherited: apply before workers are started.
        """
        cpu_ids = [cpu for cpus in self.cpus_of_node.values() for cpu in cpus]
        with contextlib.ExitStack() as steps:  # a failing step undoes those before it
            steps.enter_context(pinned(cpu_ids))
            steps.enter_context(memory_policy(self.allocation_policy, self.memory_nodes))
            self._undo = steps.pop_all()

    @contextlib.contextmanager
    def worker(self, index: int) -> Iterator[None]:
        """Inside, the calling thread is worker ``index``: on its node's CPUs and memory.

        ``bind`` binds to the worker's own node; ``interleave`` goes over all assigned nodes.
        """
        cpu_ids: tuple[int, ...] = ()
        nodes = self.memory_nodes
        if self.node_assignments:
            node = self.node_assignments[index % len(self.node_assignments)]
            cpu_ids = self.cpus_of_node[node]
            nodes = (node,) if self.allocation_policy == "bind" else nodes
        with pinned_thread(cpu_ids), memory_policy(self.allocation_policy, nodes):
            yield

    def restore(self) -> None:
        """Give threads and policy back what they had; a second call does nothing.

        Call it on the thread that applied the placement.
        """
        self._undo.close()

    def __enter__(self) -> NumaBinding:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()


def configure(
    node_assignments: Sequence[int], allocation_policy: str, machine: Machine
) -> NumaBinding:
    """Apply a placement at once: threads to the nodes' CPUs, memory by the policy.

    All threads of the process, those to come included, are confined to the CPUs of the assigned
    nodes together. A worker thread then narrows itself with ``NumaBinding.worker(index)``.

    Args:
        node_assignments: NUMA node of worker 0, 1, ...; empty: no thread is pinned.
        allocation_policy: one of ``ALLOCATION_POLICIES``. With no assignments, interleave goes
            over all nodes that have memory.
        machine: where nodes and their CPUs are looked up.

    Raises:
        PlanError: an unknown policy, an unknown node, a node without usable CPUs, or bind
            without nodes.
        RunError: the kernel refuses to pin or to set the policy.
    """
    _check_policy(allocation_policy)
    cpus_of_node = cpus_of_nodes(node_assignments, machine)
    memory_nodes = nodes_of_policy(allocation_policy, node_assignments, machine)
    binding = NumaBinding(tuple(node_assignments), allocation_policy, cpus_of_node, memory_nodes)
    binding.apply()
    return binding


def cpus_of_nodes(node_assignments: Sequence[int], machine: Machine) -> dict[int, tuple[int, ...]]:
    """Usable CPUs of each node that is named.

    Raises:
        PlanError: an unknown node, or one without usable CPUs.
    """
    usable = set(machine.cpu_ids)
    nodes = {node.id: node for node in machine.numa_nodes}
    cpus_of_node: dict[int, tuple[int, ...]] = {}
    for number in node_assignments:
        if number not in nodes:
            listed = ", ".join(map(str, nodes)) or "none known"
            raise PlanError(
                "node_assignments must name NUMA nodes of this machine",
                got=number,
                next_step=f"choose among: {listed}",
            )
        cpus = tuple(cpu for cpu in nodes[number].cpu_ids if cpu in usable)
        if not cpus:
            raise PlanError(
                "node_assignments must name nodes with CPUs this process may use",
                got=number,
                next_step="choose a node that shares CPUs with `hotloop machine`",
            )
        cpus_of_node[number] = cpus
    return cpus_of_node


def nodes_of_policy(
    allocation_policy: str, node_assignments: Sequence[int], machine: Machine
) -> tuple[int, ...]:
    """Nodes that bind and interleave take pages from; without assignments all that have memory.

    Raises:
        PlanError: bind or interleave without nodes.
    """
    nodes = tuple(sorted(set(node_assignments)))
    if allocation_policy == "interleave" and not nodes:
        nodes = tuple(n.id for n in machine.numa_nodes if n.memory_total_bytes != 0)
    if allocation_policy in ("bind", "interleave") and not nodes:
        raise _nodes_missing(allocation_policy)
    return nodes


def _check_policy(policy: str) -> None:
    if policy not in ALLOCATION_POLICIES:
        raise PlanError(
            f"allocation_policy must be one of {', '.join(ALLOCATION_POLICIES)}",
            got=repr(policy),
            next_step="use --numa-policy default",
        )


def _nodes_missing(policy: str) -> PlanError:
    return PlanError(
        f"the memory policy {policy} needs NUMA nodes",
        next_step="pass --numa-nodes, or use --numa-policy default",
    )
