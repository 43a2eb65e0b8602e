"""A run on several hosts: its plan and its step on this one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..machine import Machine
from ..parallel import Hosts, ParallelStep, default_chunk_size
from ..plan import Plan
from ..step import TrainStep
from ..step.step import LossFn


def plan_of(hosts: Hosts, plan: Plan, batch_size: int, machine: Machine) -> Plan:
    """What all hosts must have alike, and this one's workers; cuts the batch.

    Raises:
        InputError: the batch cannot be cut for so many hosts.
    """
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    workers = plan.parallel.num_workers or max(1, machine.usable_cpus // local)
    cpus = hosts.gather(workers)
    chunk = plan.parallel.chunk_size or default_chunk_size(batch_size, sum(cpus))
    chunk = hosts.first(lambda: chunk)
    hosts.cut(batch_size, chunk, cpus, measured=plan.parallel.host_shares == "measured")
    return plan.replace({"parallel.num_workers": workers, "parallel.chunk_size": chunk})


def step_of(
    hosts: Hosts,
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: tuple[torch.Tensor, ...],
    plan: Plan,
    machine: Machine,
    limits: dict[str, Any],
) -> TrainStep:
    """The step on this host's part, which combines gradients with the other hosts."""
    sums = getattr(loss_fn, "reduction", "mean") == "sum"

    def between(loss: torch.Tensor, num_rows: int, busy_s: float) -> torch.Tensor:
        return hosts.combine(model, optimizer, loss, num_rows, busy_s, sums=sums)

    limits = {**limits, "between": between}
    if next(model.parameters()).device.type != "cpu":
        micro = plan.memory.micro_batch_size
        step = TrainStep(model, loss_fn, optimizer, micro_batch_size=micro, **limits)
        step.reason = "several hosts with GPUs take the plain path"
        return step
    rows = hosts.sizes(len(example[0]))[hosts.rank]
    x, y = (t[:rows] for t in example)
    parallel = ParallelStep(model, loss_fn, optimizer, x, y, plan, machine=machine, **limits)
    hosts.resize = parallel.resize
    return parallel
