"""One ``LightningModule``'s ``training_step`` as a module whose answer is the loss.

A program runs no Python. So what ``training_step`` does beside tensors is looked at while it does
run: what it logs becomes buffers that the program writes, what it reads of the trainer becomes part
of the batch's structure, so that another value is another program.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None))
# Who names one of these may read an argument that its code does not name.
_DYNAMIC = frozenset({"locals", "vars", "eval", "exec", "_getframe", "currentframe"})


class TrainerView:
    """A trainer as ``training_step`` sees it: what is read of it is noted.

    Attributes read, writes and calls go to the trainer itself.
    """

    _own = ("_trainer", "_read", "_opaque")

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._read: list[str] = []
        self._opaque: str | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance(self.trainer, Trainer) holds.
        return type(self._trainer)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._trainer, name)
        if name.startswith("__"):
            return value
        if not isinstance(value, PLAIN):
            self._opaque = self._opaque or name
        elif name not in self._read:
            self._read.append(name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TrainerView._own:
            object.__setattr__(self, name, value)
        else:
            self._opaque = self._opaque or name
            setattr(self._trainer, name, value)


class LoggedValue:
    """One call of ``self.log``: the value as it was given, and how it is logged."""

    def __init__(self, name: str, value: Any, options: dict[str, Any]) -> None:
        self.name, self.value, self.options = name, value, options

    def same(self, other: LoggedValue) -> bool:
        """Whether the same is logged; numbers inside tensors may differ."""
        if (self.name, self.options) != (other.name, other.options):
            return False
        a, b = self.value, other.value
        return self.fits(other) and (isinstance(a, torch.Tensor) or a == b or a != a)

    def fits(self, other: LoggedValue) -> bool:
        """Whether one buffer can hold either value."""
        a, b = self.value, other.value
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and a.dtype == b.dtype
        return type(a) is type(b)


class SkippedStep(Exception):
    """``training_step`` returned ``None``: this batch makes no step."""


class TrainingStep(nn.Module):
    """``training_step`` as a module: ``forward(batch, batch_idx, read)`` gives the loss.

    Args:
        module: the ``LightningModule``. trainer: its trainer.
    """

    def __init__(self, module: nn.Module, trainer: Any) -> None:
        super().__init__()
        self.module = module
        # Guards follow the code of a method that is an attribute.
        self.training_step: Any = module.training_step
        self._takes = argument_count(self.training_step)
        self.notes = _Notes(trainer)

    def forward(self, batch: Any, batch_idx: int | None, read: Any) -> torch.Tensor:
        """The loss.

        Args:
            batch: as the loader gave it. batch_idx: ``None``: not read.
            read: what was read of the trainer; a part of the structure, not looked at here.
        """
        notes = self.notes
        notes.ran, notes.logged = True, []
        notes.output = self.training_step(*(batch, batch_idx)[: self._takes])
        loss = notes.output["loss"] if isinstance(notes.output, Mapping) else notes.output
        if loss is None:
            raise SkippedStep
        notes.check()
        if notes.refusal is None:
            with torch.no_grad():
                for number, logged in enumerate(notes.logged):
                    if isinstance(logged.value, torch.Tensor):
                        getattr(self, f"logged_{number}").copy_(logged.value.detach())
        answer: torch.Tensor = loss
        return answer

    def begin(self) -> None:
        """Make buffers for what was logged when the step ran for the first time."""
        self.notes.first = self.notes.logged
        for number, logged in enumerate(self.notes.first):
            if isinstance(logged.value, torch.Tensor):
                self.register_buffer(f"logged_{number}", torch.zeros_like(logged.value.detach()))

    def logged(self) -> Iterator[LoggedValue]:
        """What the last step logged, whether it ran in Python or as a program."""
        notes = self.notes
        if notes.ran:
            yield from notes.logged
            return
        for number, logged in enumerate(notes.by_key[notes.key]):
            value = getattr(self, f"logged_{number}", logged.value)
            yield LoggedValue(logged.name, value, logged.options)

    @contextmanager
    def watched(self, log: Callable[..., Any]) -> Iterator[None]:
        """The module with a trainer that notes what is read of it, and with another ``log``."""
        own: dict[str, Any] = self.module.__dict__
        before: dict[str, Any] = {n: own[n] for n in ("_trainer", "log") if n in own}
        own["_trainer"], own["log"] = self.notes.view, log
        try:
            yield
        finally:
            own.pop("log")
            own.update(before)


class _Notes:
    """What ``training_step`` did beside the loss.

    Attributes:
        key: of the batch's shape. by_key: what is logged for each.
        first: what was logged first. logged: what was logged in the last run in Python.
    """

    def __init__(self, trainer: Any) -> None:
        self.view = TrainerView(trainer)
        self.key: Hashable = None
        self.by_key: dict[Hashable, list[LoggedValue]] = {}
        self.first: list[LoggedValue] = []
        self.logged: list[LoggedValue] = []
        self.ran = False
        self.output: Any = None
        self.refusal: str | None = None

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """In place of the module's ``log`` while the step runs; the same arguments."""
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph")
        options.update(zip(names, args, strict=False))
        self.logged.append(LoggedValue(name, value, options))
        if options.get("enable_graph") or not isinstance(value, (int, float, torch.Tensor)):
            self.refuse(f"training_step logs {name} as a {type(value).__name__}")

    def check(self) -> None:
        """Refuse what a program would lose."""
        if self.view._opaque is not None:
            self.refuse(f"training_step uses trainer.{self.view._opaque}")
        if isinstance(self.output, Mapping) and len(self.output) > 1:
            name = next(str(key) for key in self.output if key != "loss")
            self.refuse(f"training_step returns {name} beside its loss")
        known = self.by_key.setdefault(self.key, self.logged)
        if not _alike(known, self.logged, LoggedValue.same):
            self.refuse("training_step does not log the same each time")
        if not _alike(self.first, self.logged, LoggedValue.fits):
            self.refuse("training_step logs tensors of other shapes from batch to batch")

    def read(self) -> tuple[tuple[str, Any], ...]:
        """What the step reads of the trainer, as it is now."""
        trainer = self.view._trainer
        return tuple([(name, getattr(trainer, name)) for name in self.view._read])

    def refuse(self, reason: str) -> None:
        """The first reason counts."""
        self.refusal = self.refusal or reason


def _alike(
    known: list[LoggedValue],
    found: list[LoggedValue],
    one: Callable[[LoggedValue, LoggedValue], bool],
) -> bool:
    return len(known) == len(found) and all(map(one, known, found))


def argument_count(method: Any) -> int:
    """How many of batch and batch_idx a ``training_step`` takes."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return 2 if code is None else min(2, code.co_argcount - 1) or 2


def reads_batch_idx(method: Any) -> bool:
    """Whether a ``training_step`` may read its second argument; where in doubt it does."""
    function = getattr(method, "__func__", method)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return True
    code = function.__code__
    if code.co_argcount < 3:
        return bool(code.co_flags & 0x04)  # *args
    name = code.co_varnames[2]
    if name in code.co_cellvars or not _DYNAMIC.isdisjoint(code.co_names):
        return True
    for instruction in dis.get_instructions(code):
        read = instruction.argval
        is_load = instruction.opname.startswith("LOAD_FAST")
        if is_load and (read == name or (isinstance(read, tuple) and name in read)):
            return True
    return False
