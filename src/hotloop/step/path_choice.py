"""How a step is run, and why: the one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..memory import tree
from ..plan import Plan
from .check import needs_closure


@dataclass(frozen=True)
class PathChoice:
    """How a step shall be run; what recording or capturing may still refuse is not known here.

    Attributes:
        path: ``"plain"``: as PyTorch runs it. ``"recorded"``: recorded, then a program.
            ``"cuda_graph"``: captured on the GPU. ``"workers"``: chunks are recorded, then run by
            several workers.
        reason: why the plain path; empty for the others.
        precision_reason: what this says of the precision; ``None``: nothing.
    """

    path: Literal["plain", "recorded", "cuda_graph", "workers"]
    reason: str = ""
    precision_reason: str | None = None


def choose_path(
    model: nn.Module,
    x: Any,
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    chunk_size: int | None = None,
    several_hosts: bool = False,
) -> PathChoice:
    """The path of a step, and why.

    Args:
        model: its device counts.
        x: samples, a tree of ``[batch, ...]``; only their number counts.
        plan: ``step`` and ``memory.micro_batch_size`` are used.
        optimizer: whether it needs a closure counts.
        chunk_size: samples of a chunk where workers run the step; ``None``: no workers.
        several_hosts: whether other hosts take part.
    """
    on_gpu = next(model.parameters()).device.type != "cpu"
    if on_gpu and several_hosts:
        return PathChoice("plain", "several hosts with GPUs take the plain path")
    if plan.step.compile == "off":
        return PathChoice("plain", "compile is off in the plan")
    if optimizer is not None and needs_closure(optimizer):
        name = type(optimizer).__name__
        return PathChoice("plain", f"{name} evaluates the loss itself, by a closure")
    if chunk_size is not None:
        return _on_workers(x, plan, chunk_size)
    return PathChoice("cuda_graph" if on_gpu else "recorded")


def _on_workers(x: Any, plan: Plan, chunk_size: int) -> PathChoice:
    if plan.memory.micro_batch_size is not None:
        return PathChoice("plain", "micro-batches are run one after the other")
    if plan.step.precision != "float32":
        reason = "workers compute in float32"
        return PathChoice("plain", reason, precision_reason=reason)
    batch_size = tree.num_samples(x)
    if batch_size is None or not all(t.dim() for t in tree.flatten(x)[0]):
        reason = "a batch is cut into chunks where each tensor has the samples in its first size"
        return PathChoice("plain", reason)
    if batch_size % chunk_size:
        return PathChoice("plain", f"batches of {batch_size} are not whole chunks of {chunk_size}")
    return PathChoice("workers")


def resumed_plan(plan: Plan, path: str | None, precision: str) -> Plan:
    """What is ``"auto"`` in the plan becomes what the run had: other sums differ in the last bits.

    Args:
        path: ``TrainStep.path`` of the run when it was saved; precision: its precision.
    """
    if plan.step.compile == "auto":
        plan = plan.replace({"step.compile": "off" if path == "plain" else "always"})
    if plan.step.precision == "auto":
        plan = plan.replace({"step.precision": precision})
    return plan
