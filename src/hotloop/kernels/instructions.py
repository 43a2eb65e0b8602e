"""A program of kernel calls, run step after step by one loop in C++: ``InstructionRun``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from . import binding
from .calls import Call, Tensor, address
from .loader import failure, library

# Bytes from the start of a call's structure to its rule, and the row of the control table.
RuleAt = tuple[int, int]


class Instructions:
    """Calls in order, with what happens around them in each step.

    Args:
        calls: made by the functions of ``calls``.
        rules: for each call where its scalars are, ``(binding.UpdateCall.rule.offset, group)``, or
            ``None`` where it has none. No list: no call has any.
        inputs: for each input the tensor that the calls read, and its bytes.
        loss: one float, which is kept after each step.
        counters: floats that grow by one a step.
        num_threads: for the copies of inputs.

    Raises:
        RunError: there are no kernels here.
        ValueError: calls and rules differ in number.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        rules: Sequence[RuleAt | None] | None = None,
        *,
        inputs: Sequence[tuple[Tensor, int]] = (),
        loss: Tensor | None = None,
        counters: Sequence[Tensor] = (),
        num_threads: int = 1,
    ) -> None:
        self._library = library()
        found = [None] * len(calls) if rules is None else rules
        rows = [
            binding.Instruction(
                call.entry_address,
                call.arguments_address,
                None if rule is None else call.arguments_address + rule[0],
                0 if rule is None else rule[1],
            )
            for call, rule in zip(calls, found, strict=True)
        ]
        self._most_group = max((rule[1] for rule in found if rule), default=-1)
        self._instructions = (binding.Instruction * len(rows))(*rows)
        self._inputs = (binding.InputCopy * len(inputs))(
            *(binding.InputCopy(None, target.data_ptr(), size, size) for target, size in inputs)
        )
        self._counters = (ctypes.c_void_p * len(counters))(*(c.data_ptr() for c in counters))
        self._run = binding.InstructionRun(
            instructions=ctypes.addressof(self._instructions), num_instructions=len(rows),
            inputs=ctypes.addressof(self._inputs), num_inputs=len(inputs), loss=address(loss),
            counters=ctypes.addressof(self._counters), num_counters=len(counters),
            num_threads=num_threads, steps=1,
        )  # fmt: skip
        self._at = ctypes.addressof(self._run)
        self._keep = [call.keep for call in calls], list(inputs), loss, list(counters)

    def run(
        self,
        sources: Sequence[Tensor] = (),
        steps: int = 1,
        *,
        tables: Tensor | None = None,
        losses: Tensor | None = None,
        step_bytes: Sequence[int] | None = None,
    ) -> None:
        """Run ``steps`` steps.

        Args:
            sources: for each input, dense, what the first step gets; the next ones follow.
            tables: float64 ``[steps, groups, 16]``; ``None``: rules stay as they are.
            losses: float ``[steps]``.
            step_bytes: from one step of a source to the next; ``None``: they are adjacent.

        Raises:
            RunError: a call failed; with its own words.
            ValueError: a source is missing, or the tables lack steps or groups.
        """
        if len(sources) != len(self._inputs):
            raise ValueError(f"{len(self._inputs)} inputs must have as many sources")
        if tables is not None and (tables.shape[0] < steps or tables.shape[1] <= self._most_group):
            raise ValueError(f"tables must have {steps} steps and {self._most_group + 1} groups")
        for number, (copy, source) in enumerate(zip(self._inputs, sources, strict=True)):
            copy.source = source.data_ptr()
            copy.step_bytes = copy.bytes if step_bytes is None else step_bytes[number]
        run = self._run
        run.steps = steps
        run.tables, run.groups = address(tables), 0 if tables is None else tables.shape[1]
        run.losses = address(losses)
        if self._library.hotloop_run_instructions(self._at):
            raise failure(self._library)

    @property
    def has_rules(self) -> bool:
        """Whether a call reads the control table."""
        return self._most_group >= 0

    def use_table(self, table_address: int, groups: int) -> None:
        """Where ``once`` finds the control table of its step, ``[groups, 16]``."""
        self._run.tables, self._run.groups = table_address, groups

    def once(self) -> None:
        """Run one step, without inputs and losses.

        Raises:
            RunError: a call failed; with its own words.
        """
        if self._library.hotloop_run_instructions(self._at):
            raise failure(self._library)

    @property
    def steps_done(self) -> int:
        """Whole steps of the last run, one that failed too."""
        return int(self._run.steps_done)

    @property
    def failed(self) -> int | None:
        """Number of the call that ended the last run; ``None``: none did."""
        return None if self._run.failed < 0 else int(self._run.failed)
