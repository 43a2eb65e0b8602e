"""Adam and AdamW by torch's fused kernel on the CPU, where the script leaves the choice to torch.

torch's default on the CPU is a loop of small operations for each parameter; the fused kernel
computes the same in one pass. The optimizer's groups and state stay as they are, so checkpoints do
too.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Updates:
    """What the optimizer took.

    Attributes:
        calls: of Adam's function, and of others where hotloop's kernel made them (``updates.py``);
            one for each group and step. fused: how many of them, those by hotloop's kernel too.
        seconds: of all.
    """

    calls: int = 0
    fused: int = 0
    seconds: float = 0.0


updates = Updates()
_plain: Any = None


def install(*, fuse: bool = True) -> None:
    """Replace the function that ``Adam.step`` and ``AdamW.step`` call; once a process.

    Args:
        fuse: take the fused kernel where that is the same; else only time what is called.
    """
    global _plain
    if _plain is not None:
        return
    module: Any = importlib.import_module("torch.optim.adam")
    plain = _plain = module.adam

    @functools.wraps(plain)
    def adam(
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        exp_avgs: list[torch.Tensor],
        exp_avg_sqs: list[torch.Tensor],
        max_exp_avg_sqs: list[torch.Tensor],
        state_steps: list[torch.Tensor],
        *args: Any,
        **options: Any,
    ) -> None:
        lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        if torch.compiler.is_compiling():
            plain(*lists, state_steps, *args, **options)
            return
        started = time.perf_counter()
        fused = fuse and not args and can_fuse(lists, state_steps, options)
        if fused:
            options["fused"] = True
        plain(*lists, state_steps, *args, **options)
        updates.calls += 1
        updates.fused += fused
        updates.seconds += time.perf_counter() - started

    module.adam = adam


def remove() -> None:
    """Put torch's function back."""
    global _plain
    module: Any = importlib.import_module("torch.optim.adam")
    if _plain is not None:
        module.adam, _plain = _plain, None


def can_fuse(
    lists: Sequence[list[torch.Tensor]],
    state_steps: list[torch.Tensor],
    options: dict[str, Any],
) -> bool:
    """Whether the fused kernel computes what the loop would: plain float32 tensors on the CPU.

    The kernel walks each parameter with its gradient and moments as runs of memory, so all must be
    laid out alike and without gaps.
    """
    if options.get("fused") is not None or options.get("foreach") is not None:
        return False
    if options.get("differentiable") or options.get("capturable"):
        return False
    if isinstance(options.get("lr"), torch.Tensor) or isinstance(
        options.get("beta1"), torch.Tensor
    ):
        return False
    if not are_plain(lists):
        return False
    return all(step.device.type == "cpu" and step.dtype == torch.float32 for step in state_steps)


def are_plain(lists: Sequence[list[torch.Tensor]]) -> bool:
    """Whether all are float32 tensors on the CPU without gaps, those of a parameter laid out alike.

    Args:
        lists: parameters, then their gradients and states; a list may be empty.
    """
    params, *others = lists
    for index, param in enumerate(params):
        if type(param) not in (torch.Tensor, torch.nn.Parameter) or param.dtype != torch.float32:
            return False
        if param.device.type != "cpu" or param.layout != torch.strided:
            return False
        stride = param.stride()
        if not _is_dense(param):
            return False
        for tensors in others:
            if not tensors:  # max_exp_avg_sqs without amsgrad
                continue
            other = tensors[index]
            # A gradient that is sparse has no strides.
            if other.layout != torch.strided or other.dtype != torch.float32:
                return False
            if type(other) not in (torch.Tensor, torch.nn.Parameter) or other.stride() != stride:
                return False
    return True


def _is_dense(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous() or (tensor.dim() == 2 and tensor.t().is_contiguous()):
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
