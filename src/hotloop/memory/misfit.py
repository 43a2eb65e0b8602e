"""A model that does not fit its data, told in one line: which input or target, shape and dtype.

Asked only where a step could not be run on shapes alone: plain PyTorch decides, on the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from . import tree
from .preserve import preserved
from .trace import LossFn, at_batch_size, call_with


def misfit(
    model: nn.Module,
    example: tuple[Any, ...],
    batch_size: int,
    loss_fn: LossFn | None,
    *,
    traced: Exception,
) -> ModelError | None:
    """The error if plain PyTorch cannot run a batch either; ``None``: it can.

    Args:
        model, example, batch_size, loss_fn: of ``trace_step``; no loss: inference.
        traced: what it raised. Of a model without memory (on the meta device) nothing else is
            known.
    """
    parts = _real(example, batch_size, _device(model))
    stage, error = "model" if loss_fn is None else "model and its loss", traced
    if not any(tensor.is_meta for tensor in _tensors(model, parts)):
        try:
            for begun in _run(model, parts, loss_fn):
                stage = begun
        except Exception as raised:
            error = raised
        else:
            return None
    shown = named_inputs(model, example[0])
    if stage != "model":
        shown += [pair for part in example[1:] for pair in tree.named_tensors(part, "y")]
    rows_of = at_batch_size(example, batch_size)
    line = (str(error).strip().splitlines() or [""])[0]
    return ModelError(
        f"the {stage} must run on a batch of shape "
        + ", ".join(
            f"{_shape(tensor, rows_of(tensor))} {str(tensor.dtype).removeprefix('torch.')} ({name})"
            for name, tensor in shown
        ),
        got=f"{type(error).__name__}: {line}",
        next_step="check the model's input shape and that the loss takes its output",
    )


def named_inputs(model: nn.Module, x: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of ``x`` by the names that the model's ``forward`` gives them."""
    args, kwargs = tree.arguments(x)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return tree.named_tensors(x, "x")
    found = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            for key, part in value.items():
                found += tree.named_tensors(part, key)
        else:
            found += tree.named_tensors(value, name)
    return found


def _run(model: nn.Module, parts: tuple[Any, ...], loss_fn: LossFn | None) -> Iterator[str]:
    """Forward and backward on copies of all tensors; names each stage before it begins."""
    with preserved(model, loss_fn):
        model.train(loss_fn is not None)
        x, *targets = parts
        yield "model"
        with torch.set_grad_enabled(loss_fn is not None):
            output = call_with(model, _copies(model), x)
            if loss_fn is None:
                return
            yield "loss"
            answer = tree.Arguments(output, *targets)
            call_with(loss_fn, _copies(loss_fn), answer).backward()


def _copies(module: Any) -> dict[str, torch.Tensor]:
    if not isinstance(module, nn.Module):
        return {}
    made: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        if id(tensor) not in made:
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            made[id(tensor)] = copy
        state[name] = made[id(tensor)]
    return state


def _real(
    example: tuple[Any, ...], batch_size: int, device: torch.device | None
) -> tuple[Any, ...]:
    """The example's own values; of one row alone two, as a batch norm asks for."""
    rows_of = at_batch_size(example, batch_size)

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if device is not None and not tensor.is_meta:
            tensor = tensor.to(device)
        if rows_of(tensor) is None or len(tensor) != 1 or batch_size == 1:
            return tensor.detach().clone()
        return torch.cat([tensor.detach()] * 2)

    return tuple(tree.map_tensors(real, part) for part in example)


def _device(model: nn.Module) -> torch.device | None:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), None)


def _tensors(model: nn.Module, parts: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for part in parts:
        yield from tree.flatten(part)[0]


def _shape(tensor: torch.Tensor, rows: int | None) -> tuple[int, ...]:
    return tuple(tensor.shape) if rows is None else (rows, *tensor.shape[1:])
