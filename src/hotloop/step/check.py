"""What must hold of model, loss and optimizer before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..graph.recording import NotRecordable
from .batch import Batch

# Of the model's answer and the targets, or of the answer alone.
LossFn = Callable[..., torch.Tensor]


def check_parts(model: Any, loss_fn: Any, optimizer: Any) -> None:
    """Check types, devices, and that the optimizer updates this model.

    Raises:
        ModelError: one of the three cannot be used, and why.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            "model must be a torch.nn.Module",
            got=type(model).__name__,
            next_step="pass the module itself, not its class or its weights",
        )
    if not callable(loss_fn):
        raise ModelError(
            "loss_fn must be callable as loss_fn(output, target)",
            got=type(loss_fn).__name__,
            next_step="pass torch.nn.functional.cross_entropy",
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(
            "optimizer must be a torch.optim.Optimizer",
            got=type(optimizer).__name__,
            next_step="pass torch.optim.Adam(model.parameters())",
        )
    own = {id(p) for p in model.parameters()}
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in own for p in updated):
        raise ModelError(
            "the optimizer must be built on the model's parameters",
            got=f"{len(updated)} parameters, none of them the model's",
            next_step="build the optimizer after the model: torch.optim.Adam(model.parameters())",
        )
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) != 1 or torch.device(next(iter(devices))).type not in ("cpu", "cuda"):
        raise ModelError(
            "all parameters must be on the CPU, or all on one CUDA device",
            got=f"parameters on {', '.join(sorted(devices))}",
            next_step="call model.cpu() or model.cuda() before building the optimizer",
        )


def check_example(example: Any) -> Batch:
    """The batch of an example.

    Raises:
        ModelError: it is none.
    """
    if not isinstance(example, (tuple, list)) or len(example) not in (1, 2):
        raise ModelError(
            "example must be (x, y), one batch of samples and targets, or (x,) without targets",
            got=type(example).__name__
            if not isinstance(example, (tuple, list))
            else f"{len(example)} parts",
            next_step="pass example=(x, y)",
        )
    batch = Batch(*example)
    if not batch.tensors:
        raise ModelError(
            "example must have tensors",
            got=", ".join(type(part).__name__ for part in example),
            next_step="pass tensors, or tuples, lists and dicts of them",
        )
    x, y = batch.x, batch.y
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and batch.num_samples is None:
        raise ModelError(
            "an example of two tensors must have the same number of samples in both",
            got=", ".join(str(tuple(t.shape)) for t in (x, y)),
            next_step="pass example=(x, y)",
        )
    return batch


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer evaluates the loss itself, several times a step (LBFGS)."""
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def refuse_hidden(model: nn.Module) -> None:
    """Refuse what runs beside the mathematics and would be lost in a program.

    Raises:
        NotRecordable: hooks on a module or a parameter, or parameters still to be made.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        if any(getattr(module, kind) for kind in hooks):
            raise NotRecordable(f"module {name or type(module).__name__} has hooks")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise NotRecordable(f"parameter {name} gets its shape in the first forward pass")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise NotRecordable(f"parameter {name} has hooks")
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            raise NotRecordable(f"parameter {name} is a {type(parameter).__name__}")
