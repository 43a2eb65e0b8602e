"""A run on several hosts: its checkpoint, its plan and its step on this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..machine import Machine
from ..machine.affinity import ThreadAffinity
from ..parallel import Hosts, ParallelStep, default_chunk_size, default_num_workers
from ..parallel.placement import numa_cpus, place_workers
from ..plan import Plan
from ..step import TrainStep
from ..step.batch import Batch
from ..step.check import LossFn
from ..step.path_choice import choose_path
from .checkpoint import Checkpoint, CheckpointStore


def newest_of(
    hosts: Hosts, store: CheckpointStore, latest: Callable[[], Checkpoint | None]
) -> Checkpoint | None:
    """The checkpoint that host 0 goes on from, on all hosts.

    Host 0 reads and writes; the others need no common folder unless another becomes host 0.

    Raises:
        CheckpointError: another host has a newer one.
    """
    steps = [-1 if step is None else step for step in hosts.gather(store.newest_step())]
    best = steps.index(max(steps))
    if best:
        found = f"step {steps[0]}" if steps[0] >= 0 else "none"
        raise CheckpointError(
            "host 0 must have the newest checkpoint",
            got=f"step {steps[best]} on host {best}, {found} on host 0",
            next_step="put the checkpoints where all hosts see them, or copy them to host 0",
        )
    return hosts.first(latest)


def plan_of(hosts: Hosts, plan: Plan, batch_size: int, machine: Machine) -> Plan:
    """What all hosts must have alike, and this one's workers; cuts the batch.

    Raises:
        InputError: the batch cannot be cut for so many hosts, or hosts were told different things.
    """
    told = plan.parallel
    hosts.agree(batch_size=batch_size, chunk_size=told.chunk_size, host_shares=told.host_shares)
    here, number = _processes_here()
    workers = told.num_workers or max(1, default_num_workers(machine) // here)
    cpus = hosts.gather(workers)
    chunk = told.chunk_size or default_chunk_size(batch_size, sum(cpus))
    hosts.cut(batch_size, chunk, cpus, measured=told.host_shares == "measured")
    values: dict[str, Any] = {"parallel.num_workers": workers, "parallel.chunk_size": chunk}
    if here > 1:
        # Processes that share a machine place their workers one behind the other.
        own = place_workers(plan, machine, here * workers)[
            number * workers : (number + 1) * workers
        ]
        if plan.cpu.thread_affinity.kind != "none":
            order = tuple(placement.cpu_ids[0] for placement in own)
            values["cpu.thread_affinity"] = ThreadAffinity("list", order)
        if plan.numa.node_assignments or len(numa_cpus(machine)) > 1:
            values["numa.node_assignments"] = tuple(n for s in own if (n := s.node) is not None)
    return plan.replace(values)


def step_of(
    hosts: Hosts,
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: tuple[Any, ...],
    plan: Plan,
    machine: Machine,
    limits: dict[str, Any],
) -> TrainStep:
    """The step on this host's part, which combines gradients with the other hosts."""

    def between(
        loss: torch.Tensor, num_rows: int, busy_s: float, weight: float | None
    ) -> torch.Tensor:
        return hosts.combine(model, optimizer, loss, num_rows, busy_s, weight, loss_fn)

    limits = {**limits, "between": between}
    whole = Batch(*example)
    mine = whole.part(0, hosts.sizes(whole.num_samples or 0)[hosts.rank])
    if next(model.parameters()).device.type != "cpu":
        micro = plan.memory.micro_batch_size
        step = TrainStep(model, loss_fn, optimizer, micro_batch_size=micro, **limits)
        step.reason = choose_path(model, mine.x, plan, several_hosts=True).reason
        return step
    parallel = ParallelStep(model, loss_fn, optimizer, mine.trees, plan, machine=machine, **limits)
    hosts.resize = parallel.resize
    return parallel


def _processes_here() -> tuple[int, int]:
    """How many processes of the run this machine has, and which of them this one is."""
    count, number = (os.environ.get(n, "") for n in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        return 1, 0
    return int(count), int(number)
