"""What is said when a loss cannot be called, or the very first step fails: which input it was."""

from __future__ import annotations

import inspect
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
    return ModelError(
        f"{name} must take what {type(model).__name__} answers and the data's {', '.join(targets)}",
        got=said,
        next_step="change the loss, the last layer or the targets' shape or dtype",
    )


def check_targets(loss_fn: Callable[..., Any], batch: Batch) -> None:
    """Check that a loss can be called with what the data has.

    Raises:
        ModelError: it needs targets and there are none, or there are some and it takes none.
    """
    count = len(batch)
    try:
        inspect.signature(getattr(loss_fn, "forward", loss_fn)).bind(*range(count))
    except ValueError:  # It does not tell.
        return
    except TypeError as error:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        form = "loss_fn(answer, y)" if count == 2 else "loss_fn(answer)"
        parts = zip(batch, "xy", strict=False)
        shown = ", ".join(line for part, root in parts for line in describe(part, root))
        raise ModelError(
            f"the loss must take the data's batches, as {form}",
            got=f"{name}: {error}, for {shown}",
            next_step="pass to_batch, which gives (x, y) or (x,) of a batch, or another loss",
        ) from None


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
