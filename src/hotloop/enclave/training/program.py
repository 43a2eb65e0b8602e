"""A program of one size of batch, bound to memory. No torch."""

from __future__ import annotations

from typing import Any

import numpy

from ...errors import ModelError
from ...kernels.extents import Refused
from ...kernels.instructions import Instructions, RuleAt
from .document import ProgramText
from .instructions import Reader
from .memory import Memory


class TrainingProgram:
    """Instructions on memory.

    Args:
        text: what the document says. memory: of all programs.
        num_threads: inside each kernel.
        num_states: see ``instructions.Reader``.

    Attributes:
        kind, batch_size: of the text.
        parts: where the batch goes: 0 for x or 1 for y, and an array.
        loss: one float. answer: of an evaluation, what the model gives.

    Raises:
        ModelError: the text would have it leave its memory.
    """

    def __init__(
        self, text: ProgramText, memory: Memory, num_threads: int, num_states: list[int]
    ) -> None:
        self.kind, self.batch_size = text.kind, text.batch_size
        reader = Reader(memory.spaces(text.arena_bytes), num_threads, num_states)
        calls, rules = [], []
        for value in text.instructions:
            call, group = reader.call(value)
            calls.append(call)
            offset = type(call.arguments).rule.offset if group is not None else 0
            rules.append(None if group is None else (offset, group))
        if text.kind == "evaluate" and any(rules):
            raise ModelError("an evaluation must not update weights")
        found: list[RuleAt | None] = rules
        self._instructions = Instructions(calls, found)
        try:
            self.parts = [(n, memory.laid(reader, at, written=True)) for n, at in text.parts]
            self.loss = memory.laid(reader, text.loss)
            self.answer = None if text.answer is None else memory.laid(reader, text.answer)
        except Refused as error:
            raise ModelError(
                "a program of a training export must stay inside its memory", got=error
            ) from None
        if any(array.shape[:1] != (self.batch_size,) for _, array in self.parts):
            raise ModelError("a program must take batches of its own size", got=self.batch_size)

    def run(self, table: numpy.ndarray | None = None) -> float:
        """One step on the batch that lies in ``parts``; its loss.

        Args:
            table: scalars of the updates, float64 ``[groups, 16]``; ``None``: there are none.

        Raises:
            RunError: a kernel failed, as for a label outside the classes.
        """
        if table is not None:
            self._instructions.use_table(int(table.ctypes.data), len(table))
        self._instructions.once()
        return float(self.loss)

    def put(self, batch: tuple[Any, Any]) -> None:
        """Copy a batch to where the program reads it."""
        for number, array in self.parts:
            array[...] = batch[number]
