"""Notices what a recorded train function took for constant: all that it can reach."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch.optim.lr_scheduler import LRScheduler

from ..graph.recording import NotRecordable
from .check import refuse_hidden
from .guards import Guards, optimizer_parts
from .guards_reach import Reach
from .guards_tensors import global_watches, optimizer_watches, tensor_watch
from .guards_watch import MISSING, PLAIN, Label, NamedWatch, difference

# Who names one of these may compute with a learning rate, which a program takes from the groups.
_GROUP_NUMBERS = frozenset({"param_groups", "defaults"})
_RATES = frozenset(
    {"get_last_lr", "_last_lr", "get_lr", "last_epoch", "base_lrs", "_step_count", "T_cur"}
)
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


class FunctionReach(Reach):
    """What a function reaches; optimizers and schedulers are kept apart.

    Attributes:
        optimizers, schedulers: in the order in which they were met.
        modules: each that is no part of one met before.
        arrays: of NumPy, which are too large to be looked at before each call.
        refusal: what keeps its own place between two calls, where nobody can see it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[LRScheduler] = []
        self.modules: list[torch.nn.Module] = []
        self.arrays: list[tuple[str, numpy.ndarray[Any, Any]]] = []
        self.refusal: str | None = None

    def value(self, value: Any, label: Label, depth: int = 0) -> bool:
        """As ``Reach.value``."""
        if isinstance(value, torch.optim.Optimizer):
            self.optimizer(value)
            return False
        if isinstance(value, LRScheduler):
            if self._is_new(value):
                self.schedulers.append(value)
                self.optimizer(value.optimizer)
            return False
        if isinstance(value, numpy.ndarray) and id(value) not in self._seen:
            self.arrays.append((str(label), value))
        if isinstance(value, Iterator) and not isinstance(value, torch.nn.Module):
            self.refusal = self.refusal or f"{label} is an iterator, whose place nobody can see"
            return False
        return super().value(value, label, depth)

    def module(self, module: torch.nn.Module, name: str) -> None:
        """As ``Reach.module``."""
        if id(module) not in self._seen:
            self.modules.append(module)
        super().module(module, name)

    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Note an optimizer, and the parameters that it updates."""
        if not self._is_new(optimizer):
            return
        count = len(self.optimizers)
        self.optimizers.append(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                what = f"parameter {number} of group {index} of optimizer {count}"
                self.tensor(parameter, what, registered=True)

    @property
    def attributes(self) -> set[str]:
        """Names of attributes in all code that is reached."""
        return self._attributes


class FunctionGuards(Guards):
    """A snapshot of all that one call of a function takes for constant.

    Attributes:
        tensors: all that are reached; a program reads their values each time.
        optimizers, schedulers: as reached, after those given.
        refusal: why the function cannot be recorded; ``None``: nothing says so.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        values: Sequence[Any],
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        """Take the snapshot.

        Args:
            values: what else it is called with: arguments that are no tensors.
            optimizers: that are known to make steps in it.
        """
        self._function, self._values, self._known = function, list(values), list(optimizers)
        self.refusal: str | None = None
        self.tensors: list[torch.Tensor] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[LRScheduler] = []
        self._arrays: list[tuple[str, numpy.ndarray[Any, Any], bytes]] = []
        self._take()

    def changed_arrays(self) -> str | None:
        """Which NumPy array was written since the snapshot, large ones too; slow."""
        for what, array, digest in self._arrays:
            if _digest(array) != digest:
                return f"{what} was changed in place"
        return None

    def _reach(self) -> FunctionReach:
        reach = FunctionReach()
        for optimizer in self._known:
            reach.optimizer(optimizer)
        reach.value(self._function, Label("attribute", "", "of the function"))
        for number, value in enumerate(self._values):
            reach.value(value, Label("argument", str(number), "of the function"))
        reach.finish()
        for optimizer in reach.optimizers:
            for watch in optimizer_watches(optimizer):
                reach.add(watch)
            if not _GROUP_NUMBERS.isdisjoint(reach.attributes):
                for group in optimizer.param_groups:
                    reach.add(_numbers_watch(group))
        for watch in global_watches():
            reach.add(watch)
        for tensor, what, _ in list(reach.tensors.values()):
            reach.add(tensor_watch(tensor, what, is_constant=False))
        return reach

    def _adopt(self, reach: Reach) -> None:
        assert isinstance(reach, FunctionReach)
        self.tensors = [tensor for tensor, _, _ in reach.tensors.values()]
        self.optimizers, self.schedulers = reach.optimizers, reach.schedulers
        self._arrays = [(what, a, _digest(a)) for what, a in reach.arrays if not a.dtype.hasobject]
        self._groups = [optimizer_parts(o) for o in reach.optimizers]
        self.refusal = reach.refusal or _refusal(reach)
        super()._adopt(reach)


def _refusal(reach: FunctionReach) -> str | None:
    if reach.schedulers and not _RATES.isdisjoint(reach.attributes):
        return "the function reads the state of a scheduler, which changes from step to step"
    hooks = vars(sys.modules["torch.optim.optimizer"])
    if any(hooks[name] for name in _GLOBAL_HOOKS):
        return "there are hooks on all optimizers"
    try:
        for module in reach.modules:
            refuse_hidden(module)
    except NotRecordable as verdict:
        return str(verdict)
    return None


def _digest(array: numpy.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(array.tobytes()).digest()


def _numbers_watch(group: dict[str, Any]) -> NamedWatch:
    """All plain values of a parameter group, for code that may read them."""
    names = [name for name, value in group.items() if isinstance(value, (*PLAIN, tuple))]
    return NamedWatch(
        "numbers of an optimizer group",
        lambda: {name: group.get(name, MISSING) for name in names},
        lambda name, old, new: difference(f"{name} of an optimizer group", old, new),
        lambda: None,
        alive=(group,),
        values=group,
    )
