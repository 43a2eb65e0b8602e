"""Where each worker runs and takes its memory from: never on two NUMA nodes, best cores first."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import PlanError
from ..machine import Machine, numa
from ..machine.affinity import format_cpus, placement_order
from ..machine.mempolicy import MODES, MemoryPolicy, get_memory_policy, set_memory_policy
from ..plan import Plan

# CPUs and node of a worker, see ``WorkerPlacement``.
_Place = tuple[tuple[int, ...], int | None]


@dataclass(frozen=True)
class WorkerPlacement:
    """The place of one worker.

    Attributes:
        cpu_ids: where it may run; empty: anywhere.
        node: the NUMA node of these CPUs; ``None``: not known, or it may run anywhere.
        policy: where its new pages come from; ``None``: as the kernel does it.
    """

    cpu_ids: tuple[int, ...] = ()
    node: int | None = None
    policy: MemoryPolicy | None = None


def default_num_workers(machine: Machine) -> int:
    """One for each physical core that this process may use, and no more than it may run at once."""
    return min(machine.usable_cpus, machine.usable_cores or machine.usable_cpus)


def place_workers(plan: Plan, machine: Machine, num_workers: int) -> list[WorkerPlacement]:
    """The places of worker 0, 1, ..., ``num_workers - 1``. A pure function of plan and machine.

    ``numa.node_assignments`` name the node of each worker, starting over past the end. Without them
    workers fill node after node, in the order of ``compact``: every physical core before any
    sibling, performance cores first. ``cpu.thread_affinity`` then gives each worker one CPU of
    its node; ``none`` leaves it all CPUs of its node, or all there are on a machine of one node.

    Raises:
        PlanError: unknown nodes, more workers than CPUs, or a listed CPU that is not on its node.
    """
    places = _on_assigned_nodes if plan.numa.node_assignments else _node_by_node
    policy = plan.numa.allocation_policy
    memory = numa.nodes_of_policy(policy, plan.numa.node_assignments, machine)
    return [
        WorkerPlacement(cpus, node, _policy(policy, memory, node))
        for cpus, node in places(plan, machine, num_workers)
    ]


def _on_assigned_nodes(plan: Plan, machine: Machine, num_workers: int) -> list[_Place]:
    affinity, assigned = plan.cpu.thread_affinity, plan.numa.node_assignments
    cpus_of_node = numa.cpus_of_nodes(assigned, machine)
    nodes = [assigned[worker % len(assigned)] for worker in range(num_workers)]
    if affinity.kind == "none":
        return [(cpus_of_node[node], node) for node in nodes]
    if affinity.kind == "list":
        each = affinity.cpus(machine, num_workers, knob="num_workers")
        for cpu, node in zip(each, nodes, strict=True):
            if cpu not in cpus_of_node[node]:
                raise PlanError(
                    f"thread_affinity must name CPUs of the nodes assigned; node {node} has "
                    f"{format_cpus(cpus_of_node[node])}",
                    got=f"CPU {cpu}",
                    next_step="use --thread-affinity compact, which keeps to the nodes",
                )
        return [((cpu,), node) for cpu, node in zip(each, nodes, strict=True)]
    order = placement_order(machine, spread=affinity.kind == "spread")
    free = {node: [cpu for cpu in order if cpu in cpus] for node, cpus in cpus_of_node.items()}
    for node in free:
        if nodes.count(node) > len(free[node]):
            raise PlanError(
                f"node {node} must have a CPU for each worker assigned to it",
                got=f"{nodes.count(node)} workers, {len(free[node])} CPUs",
                next_step="assign fewer with --numa-nodes, or use --thread-affinity none",
            )
    return [((free[node].pop(0),), node) for node in nodes]


def _node_by_node(plan: Plan, machine: Machine, num_workers: int) -> list[_Place]:
    affinity = plan.cpu.thread_affinity
    node_of = {cpu: node.id for node in machine.numa_nodes for cpu in node.cpu_ids}
    if affinity.kind != "none":
        each = affinity.cpus(machine, num_workers, knob="num_workers")
        return [((cpu,), node_of.get(cpu)) for cpu in each]
    usable = numa_cpus(machine)
    order = placement_order(machine, spread=False)
    if len(usable) < 2:
        return [((), None)] * num_workers
    nodes = [node_of.get(order[worker % len(order)]) for worker in range(num_workers)]
    return [(() if node is None else usable[node], node) for node in nodes]


def numa_cpus(machine: Machine) -> dict[int, tuple[int, ...]]:
    """The nodes that have CPUs this process may use, and these."""
    usable = set(machine.cpu_ids)
    found = {n.id: tuple(c for c in n.cpu_ids if c in usable) for n in machine.numa_nodes}
    return {node: cpus for node, cpus in found.items() if cpus}


def _policy(name: str, nodes: tuple[int, ...], own: int | None) -> MemoryPolicy | None:
    if name == "default":
        return None
    if name == "bind" and own is not None:
        nodes = (own,)
    return MemoryPolicy(MODES[name], () if name == "local" else nodes)


@contextlib.contextmanager
def placed(placement: WorkerPlacement | None) -> Iterator[None]:
    """Inside, the calling thread runs there; afterwards where it ran before.

    The CPUs are a wish; what the kernel refuses is left out.

    Raises:
        RunError: the kernel refuses the memory policy.
    """
    if placement is None or (not placement.cpu_ids and placement.policy is None):
        yield
        return
    with contextlib.ExitStack() as undo:
        if placement.policy is not None:
            undo.callback(set_memory_policy, get_memory_policy())
            set_memory_policy(placement.policy)
        if placement.cpu_ids:
            before = os.sched_getaffinity(0)
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, placement.cpu_ids)
                undo.callback(os.sched_setaffinity, 0, before)
        yield


def fresh_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and strides, which are dense, on pages that nobody has touched."""
    block = torch.frombuffer(mmap.mmap(-1, max(tensor.nbytes, 1)), dtype=torch.uint8)
    return block[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
