"""The optimizer state that a program reads and writes: whether it is still the optimizer's."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from .updates import UNEVEN, Update


class BoundState:
    """State tensors and step counters that a program was lowered on.

    A user may clear the state, exchange an entry or a tensor of it, load another one, or set back
    the counter of a single parameter; and a plain step of another shape of batch leaves out the
    parameters that get no gradient in it.

    Args:
        updates: the rules in the program. tensors: what their ``bind`` gave, counters included.
    """

    def __init__(self, updates: Iterable[Update], tensors: Iterable[torch.Tensor]) -> None:
        held = {id(tensor) for tensor in tensors}
        self._optimizers = []
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        self._counters: list[list[torch.Tensor]] = []
        for update in updates:
            known = update.optimizer.state
            owners = list(known.values())
            self._optimizers.append((update.optimizer, known, owners))
            mine = [known[w] for w in update.weights if w in known]
            entries = [(owner, name, t) for owner in mine for name, t in owner.items()]
            self._tensors += [entry for entry in entries if id(entry[2]) in held]
            self._counters.append([t for _, name, t in entries if name == "step" and id(t) in held])
        self._versions = self._versions_now()

    def is_current(self) -> bool:
        """Whether all tensors are still the optimizers' own."""
        for optimizer, known, owners in self._optimizers:
            now = optimizer.state
            if now is not known or len(now) != len(owners):
                return False
            if not all(map(operator.is_, now.values(), owners)):
                return False
        return all(owner.get(name) is tensor for owner, name, tensor in self._tensors)

    def uneven(self) -> str | None:
        """Whether counters that were alike differ now; a program has one count for all."""
        versions = self._versions_now()
        if versions != self._versions:
            self._versions = versions
            if any(len({float(c) for c in counters}) > 1 for counters in self._counters):
                return UNEVEN
        return None

    def _versions_now(self) -> list[int]:
        """How often each counter was written beyond the first one of its optimizer."""
        found = []
        for counters in self._counters:
            first = counters[0]._version if counters else 0
            found += [counter._version - first for counter in counters]
        return found
