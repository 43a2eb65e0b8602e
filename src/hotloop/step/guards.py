"""Notices, between two steps, that something changed which a recorded step took for constant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import kernels
from .guards_memory import Block, Word, tensor_block
from .guards_ran import Ran
from .guards_reach import Reach
from .guards_settings import PythonState, difference_of_settings, torch_settings
from .guards_tables import BlockTable, WordTable
from .guards_tensors import (
    TensorWatch,
    global_watches,
    optimizer_watches,
    own_step,
    tensor_watch,
)
from .guards_watch import Label, NamedWatch, Watch

__all__ = ["Guards", "PythonState"]

# A dict that changes in each step, such as the globals of a script: after so many times it is not
# worth looking for a change of it.
_OFTEN = 8


class Guards:
    """A snapshot of all that one train step takes for constant.

    Values of parameters, buffers and optimizer state are no part of it, nor are the numbers of
    parameter groups (learning rate, betas): a step reads these each time.

    Attributes:
        generators: generators of random numbers that model and loss reach, with their places.
        iterators: places of iterators that their code names: a step may take the next value.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        extra: Sequence[torch.Tensor] = (),
        ran: Ran | None = None,
    ) -> None:
        """Take the snapshot.

        Args:
            ran: code that ran in the step; what other code names does not count. ``None``: what
                all code names counts that the step may reach.
            extra: tensors that the recording took for constant, beside those that are found in
                attributes, closures and globals: a change of their values counts.
        """
        self._parts = model, loss_fn, optimizer, tuple(extra)
        self.ran = ran
        self._groups = [optimizer_parts(optimizer)]
        self._take()

    def _take(self) -> None:
        self._settings = torch_settings()
        self.generators: list[tuple[str, Any]] = []
        self.iterators: list[str] = []
        self._watches: list[Watch] = []
        self._adopt(self._reach())

    def changed(self) -> str | None:
        """What has changed since the snapshot, in one line; ``None``: nothing that counts."""
        if torch_settings() != self._settings:
            return difference_of_settings(self._settings, torch_settings())
        message = self._optimizers_changed()
        if message is not None:
            return message
        described = self._blocks.first_changed()
        if described is not None:
            message = self._check([described, *self._watches])
            if message is None:
                self._lay_out()
            return message
        index = self._words.first_changed()
        if index >= 0:
            message = self._look_closer(index)
            if message is not None:
                return message
        for tensor, version in self._versions:
            if tensor._version != version:
                return self._check(self._watches)
        return self._check(self._others) if self._others else None

    def _look_closer(self, index: int) -> str | None:
        """Compare the values that the words from this one on stand for."""
        while index >= 0:
            watch, start, end = self._words.watch_at(index)
            words = watch.words()
            message, sure = watch.check()
            if message is not None or not sure:
                return message or self._compare_afresh()
            if words is None or len(words) != end - start:
                self._lay_out()  # The table has another form.
                return self._check(self._watches)
            self._words.refresh(start, words)
            index = self._words.first_changed_from(end)
            if isinstance(watch, NamedWatch):
                watch.refreshed += 1
                if watch.refreshed == _OFTEN:
                    self._lay_out()  # From now on its values are compared at once.
                    return self._check(self._watches)
        return None

    def _check(self, watches: list[Watch]) -> str | None:
        for watch in watches:
            message, sure = watch.check()
            if message is not None or not sure:
                return message or self._compare_afresh()
        return None

    def compare(self) -> str | None:
        """The same answer, by comparing each value; slow."""
        if torch_settings() != self._settings:
            return difference_of_settings(self._settings, torch_settings())
        message = self._optimizers_changed()
        if message is not None:
            return message
        return self._check(self._watches)

    def _optimizers_changed(self) -> str | None:
        for optimizer, groups, step in self._groups:
            if optimizer.param_groups is not groups:
                return "optimizer parameter groups changed"
            if own_step(optimizer) is not step:
                return "the optimizer's step was replaced"
        return None

    def _reach(self) -> Reach:
        model, loss_fn, optimizer, extra = self._parts
        reach = Reach(self.ran)
        reach.module(model, "")
        if isinstance(loss_fn, nn.Module):
            reach.module(loss_fn, "loss_fn")
        else:
            reach.value(loss_fn, Label("attribute", "", "of the loss"))
        for watch in (*optimizer_watches(optimizer), *global_watches()):
            reach.add(watch)
        for index, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                what = f"parameter {number} of optimizer group {index}"
                reach.tensor(parameter, what, registered=True)
        for number, tensor in enumerate(extra):
            reach.tensor(tensor, f"constant tensor {number}", registered=False)
        reach.finish()
        for tensor, what, registered in list(reach.tensors.values()):
            reach.add(tensor_watch(tensor, what, is_constant=not registered))
        return reach

    def _compare_afresh(self) -> str | None:
        """Take another snapshot: keep it where it is equal, else name the first difference."""
        fresh = self._reach()
        new = {watch.key: watch for watch in fresh.watches}
        for watch in self._watches:
            if watch.key in new:
                message = watch.differs_from(new[watch.key])
                if message is not None:
                    return message
        known = {watch.key for watch in self._watches}
        for key in (*known - new.keys(), *new.keys() - known):
            return f"{key} changed"
        self._adopt(fresh)
        return None

    def _adopt(self, reach: Reach) -> None:
        self._watches = reach.watches
        self.generators, self.iterators = reach.generators, reach.iterators
        self._lay_out()

    def _lay_out(self) -> None:
        """Find the memory to look at; what shows no change in memory is compared each time."""
        words: list[tuple[Watch, list[Word]]] = []
        blocks: list[tuple[Watch, Block]] = []
        self._others: list[Watch] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        fast = kernels.is_available()
        for watch in self._watches:
            found = watch.words() if fast else None
            if isinstance(watch, TensorWatch) and found is not None:
                block = tensor_block(watch.tensor)
                if block is None:
                    found = None
                else:
                    blocks.append((watch, block))
                    version = watch.kept.get("version")
                    if version is not None:
                        self._versions.append((watch.tensor, version))
            if found is None or (isinstance(watch, NamedWatch) and watch.refreshed >= _OFTEN):
                self._others.append(watch)
            else:
                words.append((watch, found))
        self._words, self._blocks = WordTable(words), BlockTable(blocks)


def optimizer_parts(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, Any, Any]:
    """An optimizer, its groups, and the step that it has in place of its class's, if it has."""
    return optimizer, optimizer.param_groups, own_step(optimizer)
