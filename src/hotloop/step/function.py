"""``FunctionStep``: a train function of the user's own, run as a program where that is possible."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..memory import TensorArena
from ..memory.tree import Structure, flatten
from ..plan import Plan
from .batch import key_of
from .guards_watch import PLAIN
from .recorded_function import RecordedFunction


class FunctionStep:
    """A train function as it is called: ``step(*args, **kwargs)`` gives what it gives.

    The function makes one or several whole train steps on models and optimizers that it reaches by
    itself: in its closure, as globals, as attributes of what it is a method of. The first calls
    with arguments of a shape run as they are, and are recorded. Where two recordings say the same,
    later calls run as a program. What cannot become one stays as it is, and ``reason`` says why.

    Tensors come back detached. After a call that ran as a program the ``grad`` of parameters is
    ``None``, but for those that the function never lets go.

    Attributes:
        arena: entered around each call: where its tensors come from.
    """

    def __init__(
        self, function: Callable[..., Any], recorded: RecordedFunction | None, reason: str = ""
    ) -> None:
        self.function = function
        self.arena: AbstractContextManager[Any] = nullcontext()
        self._recorded, self._reason = recorded, reason

    @property
    def path(self) -> str:
        """``"compiled"``: calls with arguments of some shape run as a program; ``"plain"``."""
        return "compiled" if self._recorded is not None and self._recorded.has_program else "plain"

    @property
    def reason(self) -> str:
        """Why the last call ran as it did."""
        return self._reason if self._recorded is None else self._recorded.reason

    @property
    def is_recorded(self) -> bool:
        """Whether calls may become programs."""
        return self._recorded is not None

    @property
    def working_bytes(self) -> int | None:
        """What the program takes beside weights, optimizer state and arguments; ``None``: there is
        none."""
        return None if self._recorded is None else self._recorded.arena_bytes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with self.arena:
            return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorded = self._recorded
        if recorded is None or recorded.given_up is not None:
            return _detached(self.function(*args, **kwargs))
        tensors, structure = flatten((args, kwargs))
        key = structure, key_of(tensors)
        if recorded.ready(key):
            if not recorded.writes_into(key, tensors):
                return recorded.call(key, tensors)
            recorded.reason = "an argument is a tensor that the function writes"
            return _detached(self.function(*args, **kwargs))
        result = recorded.record_call(
            key, tensors, list(_objects(structure)), lambda: self.function(*args, **kwargs)
        )
        recorded.build()
        return _detached(result)


def compile_function(function: Callable[..., Any], plan: Plan | None = None) -> FunctionStep:
    """A train function as a step: ``step(*args, **kwargs)``.

    Args:
        function: makes whole train steps, in place on models and optimizers that it reaches.
        plan: ``step.compile`` and ``memory`` are used; the defaults when ``None``.

    Raises:
        ModelError: it is no function.
    """
    if isinstance(function, nn.Module | type) or not callable(function):
        raise ModelError(
            "compile_step takes model, loss_fn, optimizer and example, or one train function",
            got=type(function).__name__,
            next_step="pass a function that makes whole steps, or the other three too",
        )
    plan = plan or Plan()
    if plan.step.compile == "off":
        step = FunctionStep(function, None, "compile is off in the plan")
    else:
        recorded = RecordedFunction(function, num_threads=torch.get_num_threads())
        step = FunctionStep(function, recorded)
    if plan.memory.tensor_arena == "try":
        arena = TensorArena(huge_pages=plan.memory.huge_pages, keep_pages=True)
        step.arena = arena
        weakref.finalize(step, arena.trim).atexit = False
    return step


def _objects(structure: Structure) -> Iterator[Any]:
    """What is neither a tensor nor a plain value."""
    for part in structure.parts:
        yield from _objects(part)
    if structure.kind is not None and not structure.parts and not isinstance(structure.like, PLAIN):
        yield structure.like


def _detached(result: Any) -> Any:
    tensors, structure = flatten(result)
    if not any(t.grad_fn is not None for t in tensors):
        return result
    found = [t if t.grad_fn is None else t.detach() for t in tensors]
    return structure.unflatten(found)
