"""What is said when the very first step fails: which input or target it was."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from ..data.batch import Batch, describe
from ..errors import ModelError

# What a wrong shape, dtype, name or number of arguments ends in.
_KINDS = (TypeError, ValueError, RuntimeError, IndexError, KeyError)
_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl", "forward")


def does_not_fit(
    error: Exception, model: nn.Module, loss_fn: Callable[..., Any], batch: Batch
) -> ModelError | None:
    """The error of a model or loss that does not fit its batch, in one line.

    Args:
        error: of the step. batch: ``(x, y)`` or ``(x,)``.

    Returns:
        ``None``: something else went wrong.
    """
    if not isinstance(error, _KINDS):
        return None
    where = _where(error.__traceback__, model, loss_fn)
    if where is None:
        return None
    inputs, targets = describe(batch[0], "x"), describe(batch[1], "y") if len(batch) > 1 else []
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    if where == "model":
        return ModelError(
            f"{type(model).__name__} must take the data's {', '.join(inputs)}",
            got=said,
            next_step="change the layer or the data; to_batch says what is x and what y",
        )
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not targets:
        return ModelError(
            f"{name} must take what {type(model).__name__} answers, as loss_fn(answer): the data "
            f"has no y, but {', '.join(inputs)}",
            got=said,
            next_step="pass to_batch, which gives (x, y) of a batch",
        )
    return ModelError(
        f"{name} must take what {type(model).__name__} answers and the data's {', '.join(targets)}",
        got=said,
        next_step="change the loss, the last layer or the targets' shape or dtype",
    )


def _where(
    trace: TracebackType | None, model: nn.Module, loss_fn: Callable[..., Any]
) -> str | None:
    """Whether it was in the model or in the loss or its gradient; ``None``: in neither."""
    found = None
    code = getattr(loss_fn, "__code__", None)
    while trace is not None:
        frame = trace.tb_frame
        inside = frame.f_locals.get("self")
        name = frame.f_code.co_name
        if inside is model and name in _MODULE_CALLS:
            return "model"
        if frame.f_code is code or inside is loss_fn or name == "backward":
            found = "loss"
        if name == "call" and frame.f_globals.get("__name__", "").endswith("memory.tree"):
            return "model"  # Names or numbers of arguments that forward does not have.
        trace = trace.tb_next
    return found
