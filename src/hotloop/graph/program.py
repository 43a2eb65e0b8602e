"""Instructions bound to memory, run step by step without autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.binding import ControlRow, UpdateRule
from ..kernels.calls import Call
from .lower import Late, Lowered

_RULE_FIELDS = [name for name, *_ in UpdateRule._fields_]
_INTEGERS = ("kind", "first_step")


class Program:
    """A lowered graph as a callable.

    Args:
        lowered: its instructions.
        written: tensors that they write in place; autograd is told.
    """

    def __init__(self, lowered: Lowered, written: Sequence[torch.Tensor]) -> None:
        self.lowered = lowered
        self._written = list(written)
        self._instructions = list(lowered.instructions)
        self._rules: list[tuple[Any, int]] = []
        for place, group in lowered.updates.items():
            call = lowered.instructions[place]
            assert isinstance(call, Call)
            self._rules.append((call.arguments, group))

    @property
    def arena_bytes(self) -> int:
        """Of the temporaries whose place is fixed."""
        return self.lowered.arena_bytes

    def run(
        self, batch: Sequence[torch.Tensor], tables: torch.Tensor | None, steps: int = 1
    ) -> torch.Tensor:
        """``steps`` steps; step i has rows ``[i * rows, (i + 1) * rows)`` of each tensor of the batch.

        Args:
            batch: as the graph's inputs have it; of one step they have the recorded shapes.
            tables: scalars of the updates, float64 ``[steps, groups, 16]``; ``None``: no updates.

        Returns:
            The losses, float32 ``[steps]``.
        """
        losses = torch.empty(steps)
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():  # type: ignore[attr-defined]
            for step in range(steps):
                for target, source in zip(self.lowered.batch, batch, strict=True):
                    rows = len(target)
                    target.copy_(source[step * rows : (step + 1) * rows] if steps > 1 else source)
                if tables is not None:
                    self._set_rules(tables, step)
                for instruction in self._instructions:
                    instruction()
                losses[step] = self.output(0)
        torch.autograd.graph.increment_version(self._written)
        return losses

    def output(self, number: int) -> torch.Tensor:
        """The loss (0) or a gradient of the last step; overwritten by the next one."""
        value = self.lowered.outputs[number]
        tensor: torch.Tensor = self.lowered.late[value.place] if isinstance(value, Late) else value
        return tensor

    def _set_rules(self, tables: torch.Tensor, step: int) -> None:
        rows = (ControlRow * tables.shape[1]).from_address(tables[step].data_ptr())
        rules = [rule_of(row) for row in rows]
        for arguments, group in self._rules:
            arguments.rule = rules[group]


def rule_of(row: Any) -> Any:
    """The ``UpdateRule`` of a row of the control table."""
    values = {name: getattr(row, name) for name in _RULE_FIELDS}
    return UpdateRule(**values | {name: int(values[name]) for name in _INTEGERS})


