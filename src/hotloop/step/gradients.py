"""``GradientStep``: forward and backward of somebody else's loop as a program.

The loop keeps its optimizer, its clipping and its accumulation; what it calls to get gradients is
recorded, checked, guarded and run as any step is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..memory import TensorArena
from ..plan import Plan
from .batch import Batch
from .path_choice import choose_path
from .recorded import RecordedStep


class GradientStep:
    """``gradients(x, plain)``: the loss of a batch; its gradients are added to ``grad``.

    Args:
        model: a module that has all that ``plain`` reads: parameters, buffers and, as attributes,
            the functions whose code counts.
        optimizer: built on its parameters; its groups are guarded, its ``step`` is not called.
        plan: ``memory.tensor_arena`` and ``step.compile`` are used; ``None``: the defaults.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan | None = None
    ) -> None:
        self._plan = plan or Plan()
        self._arena: AbstractContextManager[Any] = nullcontext()
        if self._plan.memory.tensor_arena == "try":
            arena = TensorArena(huge_pages=self._plan.memory.huge_pages, keep_pages=True)
            self._arena = arena
            weakref.finalize(self, arena.trim).atexit = False
        choice = choose_path(model, (), self._plan, optimizer=optimizer)
        self._reason = choice.reason
        self._recorded: RecordedStep | None = None
        if choice.path == "recorded":
            threads = torch.get_num_threads()
            self._recorded = RecordedStep(
                model, _nothing, optimizer, num_threads=threads, whole=False
            )
        elif choice.path != "plain":
            self._reason = "gradients alone become a program on the CPU"

    @property
    def path(self) -> str:
        """``"compiled"``: batches of a shape run as a program; ``"plain"``."""
        fast = self._recorded is not None and self._recorded.has_program
        return "compiled" if fast else "plain"

    @property
    def reason(self) -> str:
        """Why the last batch ran as it did."""
        return self._reason if self._recorded is None else self._recorded.reason

    def __call__(self, x: Any, plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Add the gradients of a batch.

        Args:
            x: all that ``plain`` takes from its caller, in one tree.
            plain: runs forward and backward on it, adds the gradients, gives the loss.

        Returns:
            The loss, a detached scalar.
        """
        recorded = self._recorded
        with self._arena:
            if recorded is None or recorded.given_up is not None:
                return plain()
            batch = Batch(x)
            key = batch.key()
            if recorded.ready(key):
                return recorded.add_gradients(key, batch.tensors, first=False)
            loss = recorded.record(key, batch, lambda _: plain())
            recorded.build()
            return loss


def _nothing() -> None:
    """There is no loss function beside the model."""
