"""Whether a step is compiled, and why: the one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..plan import Plan
from .compiler import missing_reason
from .program import may_be_compiled

# A run of so many seconds on the plain path gains more than the 20 seconds that compiling takes.
PAYS_BACK_S = 60.0
# Plain PyTorch on one core of a recent server, and what a step costs beside its arithmetic. Not
# measured: the same run must take the same path every time.
_NOMINAL_FLOP_PER_S = 40e9
_NOMINAL_STEP_S = 0.5e-3


@dataclass(frozen=True)
class PathChoice:
    """How a step shall be run; what the capture itself may still refuse is not known here.

    Attributes:
        path: ``"plain"``: as PyTorch runs it. ``"compiled"``: captured for the compiler.
            ``"cuda_graph"``: captured on the GPU, by no compiler. ``"workers"``: chunks of it are
            compiled and run by several workers.
        reason: why the plain path; empty for the others.
        precision_reason: what this says of the precision; ``None``: nothing.
    """

    path: Literal["plain", "compiled", "cuda_graph", "workers"]
    reason: str = ""
    precision_reason: str | None = None

    @property
    def uses_compiler(self) -> bool:
        """Whether the step is captured for the compiler, which takes memory of its own."""
        return self.path in ("compiled", "workers")


def choose_path(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    plan: Plan,
    *,
    expected_s: float | None = None,
    is_cached: bool | None = None,
    chunk_size: int | None = None,
    several_hosts: bool = False,
) -> PathChoice:
    """The path of a step, and why.

    Args:
        model: its device counts and, with ``is_cached=None``, the shapes of its weights.
        x, y: a batch ``[batch, ...]``; only shapes, strides and dtypes count.
        plan: ``step`` and ``memory.micro_batch_size`` are used.
        expected_s: see ``plain_run_s``; ``None``: a long run.
        is_cached: whether the cache holds this very step, compiled; ``None``: it is not captured
            yet, and what counts is whether the cache may hold it.
        chunk_size: samples of a chunk where workers run the step; ``None``: no workers.
        several_hosts: whether other hosts take part.
    """
    on_gpu = next(model.parameters()).device.type != "cpu"
    if on_gpu and several_hosts:
        return PathChoice("plain", "several hosts with GPUs take the plain path")
    if plan.step.compile == "off":
        return PathChoice("plain", "compile is off in the plan")
    if chunk_size is not None:
        return _on_workers(len(x), plan, chunk_size)
    if on_gpu:
        return PathChoice("cuda_graph")  # In a fraction of a second.
    is_short = plan.step.compile == "auto" and expected_s is not None and expected_s < PAYS_BACK_S
    no_compiler = missing_reason()
    if is_short or no_compiler:
        if is_cached is None:
            micro = plan.memory.micro_batch_size or len(x)
            is_cached = may_be_compiled(model, (x[:micro], y[:micro]))
        if not is_cached:
            too_short = f"about {expected_s or 0:.0f} s of training cannot pay the compiler back"
            return PathChoice("plain", no_compiler or too_short)
    return PathChoice("compiled")


def _on_workers(batch_size: int, plan: Plan, chunk_size: int) -> PathChoice:
    if plan.memory.micro_batch_size is not None:
        return PathChoice("plain", "micro-batches are run one after the other")
    if plan.step.precision != "float32":
        reason = "workers compute in float32"
        return PathChoice("plain", reason, precision_reason=reason)
    if batch_size % chunk_size:
        return PathChoice("plain", f"batches of {batch_size} are not whole chunks of {chunk_size}")
    return PathChoice("workers")


def plain_run_s(num_steps: int, flop_per_step: int | None, num_threads: int) -> float | None:
    """Seconds that so many steps take on the plain path, at a nominal rate; ``None``: unknown."""
    if flop_per_step is None:
        return None
    return num_steps * (flop_per_step / (_NOMINAL_FLOP_PER_S * num_threads) + _NOMINAL_STEP_S)


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
