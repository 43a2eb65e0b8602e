"""Steps of optimizers and schedulers inside a function that is being recorded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..graph.recording import Marker, Recorder
from ..graph.user_code import user_line
from .recorded_shape import is_sparse, reason_of_weights
from .updates import reason_outside


class Markers:
    """While entered, each step of an optimizer or a scheduler is a marker in a recording.

    It is made as ever; what it asks of ATen is not written down.

    Args:
        recorder: entered before this.
        optimizers, schedulers: known by number; new ones are appended.
    """

    def __init__(
        self,
        recorder: Recorder,
        optimizers: list[torch.optim.Optimizer],
        schedulers: list[LRScheduler],
    ) -> None:
        self._recorder = recorder
        self._optimizers, self._schedulers = optimizers, schedulers
        self._open = contextlib.ExitStack()
        self._step = contextlib.ExitStack()
        self.scheduled: list[LRScheduler] = []

    def __enter__(self) -> Markers:
        before = register_optimizer_step_pre_hook(self._before_step)
        after = register_optimizer_step_post_hook(self._after_step)
        self._open.callback(before.remove)
        self._open.callback(after.remove)
        for kind in _with_subclasses(LRScheduler):
            if "step" in vars(kind):
                self._open.enter_context(_replaced(kind, self._scheduler_step(vars(kind)["step"])))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._step.close()  # An optimizer's step may have raised.
        self._open.close()

    def _refuse(self, reason: str) -> None:
        if self._recorder.is_recording:
            line = user_line()
            self._recorder.refusal = f"{line}: {reason}" if line else reason

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        reason = _reason_plain(optimizer)
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            reason = f"{type(optimizer).__name__} makes a step with a closure"
        if reason is not None:
            self._refuse(reason)
            return
        if not self._recorder.is_recording:
            return
        weights = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if optimizer not in self._optimizers:
            self._optimizers.append(optimizer)
        number = self._optimizers.index(optimizer)
        gradients = [w.grad for w in weights]
        with torch._C.DisableTorchFunction():
            self._recorder.mark(Marker("update", number), weights, gradients)
            self._step.enter_context(self._recorder.paused(gradients))

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._step.close()

    def _scheduler_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def noted(scheduler: LRScheduler, *args: Any, **kwargs: Any) -> Any:
            if not self._recorder.is_recording:
                return step(scheduler, *args, **kwargs)
            if args or kwargs:
                self._refuse(f"{type(scheduler).__name__} gets a value in its step")
            if scheduler not in self._schedulers:
                self._schedulers.append(scheduler)
            self._recorder.mark(Marker("schedule", self._schedulers.index(scheduler)))
            self.scheduled.append(scheduler)
            with self._recorder.paused():
                return step(scheduler, *args, **kwargs)

        return noted


def _reason_plain(optimizer: torch.optim.Optimizer) -> str | None:
    reason = reason_outside(optimizer) or reason_of_weights(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    if reason is None and any(is_sparse(g) for g in gradients):
        reason = "a parameter gets a sparse gradient"
    return reason


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    below: list[type] = kind.__subclasses__()
    for each in below:
        yield from _with_subclasses(each)


@contextlib.contextmanager
def _replaced(kind: type, step: Callable[..., Any]) -> Iterator[None]:
    before = vars(kind)["step"]
    kind.step = step  # type: ignore[attr-defined]
    try:
        yield
    finally:
        kind.step = before  # type: ignore[attr-defined]
