"""What a loss keeps between steps: parameters and buffers that are not the model's.

A loss may be a module, a method of one, a ``functools.partial`` or a function that names modules:
what it keeps must be in a checkpoint, and so must parameters that only the optimizer knows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError


def loss_modules(loss_fn: Any) -> list[nn.Module]:
    """The modules of a loss: itself, or those it is bound to or closes over."""
    found: dict[int, nn.Module] = {}

    def look(thing: Any) -> None:
        if isinstance(thing, nn.Module):
            found.setdefault(id(thing), thing)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                look(part)
        elif isinstance(getattr(thing, "__self__", None), nn.Module):
            look(thing.__self__)
        for cell in getattr(thing, "__closure__", None) or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # Not filled yet.
                continue
            if isinstance(inside, nn.Module):
                look(inside)

    look(loss_fn)
    return list(found.values())


def loss_state(loss_fn: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of the loss, and of parameters that neither it nor the model has."""
    modules = _own_modules(loss_fn, model)
    return {
        "modules": [dict(module.state_dict()) for module in modules],
        "parameters": [p.detach() for p in _other_parameters(modules, model, optimizer)],
    }


def check_loss_state(
    state: dict[str, Any], loss_fn: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Raises CheckpointError where a state is of another loss."""
    here = loss_state(loss_fn, model, optimizer)
    if _outline(state) != _outline(here):
        raise CheckpointError(
            "a checkpoint must be of the same loss",
            got=f"{_outline(state)} saved, {_outline(here)} here",
            next_step="pass the loss it was made with, or another folder",
        )


def load_loss_state(
    state: dict[str, Any], loss_fn: Any, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put back what ``loss_state`` gave."""
    modules = _own_modules(loss_fn, model)
    for module, values in zip(modules, state["modules"], strict=True):
        module.load_state_dict(values)
    others = _other_parameters(modules, model, optimizer)
    with torch.no_grad():
        for parameter, value in zip(others, state["parameters"], strict=True):
            parameter.copy_(value)


def _own_modules(loss_fn: Any, model: nn.Module) -> list[nn.Module]:
    """Those with a state that is not the model's."""
    inside = {id(module) for module in model.modules()}
    return [m for m in loss_modules(loss_fn) if id(m) not in inside and m.state_dict()]


def _other_parameters(
    modules: list[nn.Module], model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[torch.Tensor]:
    known = {id(p) for module in (model, *modules) for p in module.parameters()}
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    return [p for p in updated if id(p) not in known]


def _outline(state: dict[str, Any]) -> list[Any]:
    shapes = [
        {name: list(getattr(value, "shape", ())) for name, value in values.items()}
        for values in state["modules"]
    ]
    return [*shapes, *(list(value.shape) for value in state["parameters"])]
