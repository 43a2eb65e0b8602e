"""Instructions bound to memory, run step by step without autograd.

Calls of hotloop's kernels that follow each other are one block, which a loop in C++ runs. Where the
whole program is one block, so are many steps of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..kernels.calls import Call
from ..kernels.instructions import Instructions, RuleAt
from .late import Late
from .lower import Lowered


class Program:
    """A lowered graph as a callable.

    Args:
        lowered: its instructions.
        written: tensors that they write in place; autograd is told.
        counters: floats that grow by one a step.
        num_threads: for copies of the batch.
    """

    def __init__(
        self,
        lowered: Lowered,
        written: Sequence[torch.Tensor],
        counters: Sequence[torch.Tensor] = (),
        num_threads: int = 1,
    ) -> None:
        self._lowered = lowered
        self._written = list(written)
        self._counters = list(counters)
        self._whole: Instructions | None = None
        self._blocks: list[Instructions] = []
        self._actions: list[Callable[[], Any]] = []
        loss = lowered.outputs[0] if lowered.outputs else None
        self._keeps_losses = _is_float(loss)
        if all(isinstance(i, Call) for i in lowered.instructions):
            self._whole = Instructions(
                lowered.instructions,  # type: ignore[arg-type]
                [self._rule(n) for n in range(len(lowered.instructions))],
                inputs=[(t, t.untyped_storage().nbytes()) for t in lowered.batch],
                loss=loss if self._keeps_losses else None,
                counters=self._counters,
                num_threads=num_threads,
            )
        self._make_actions()

    @property
    def arena_bytes(self) -> int:
        """Of the temporaries whose place is fixed."""
        return self._lowered.arena_bytes

    @property
    def lowered(self) -> Lowered:
        """The instructions, and what they work on."""
        return self._lowered

    @property
    def is_native(self) -> bool:
        """Whether hotloop's kernels make all of it, several steps in one call too."""
        return self._whole is not None and self._keeps_losses

    def run(
        self, batch: Sequence[torch.Tensor], tables: torch.Tensor | None, steps: int = 1
    ) -> torch.Tensor:
        """``steps`` steps; step i has rows ``[i * rows, (i + 1) * rows)`` of the batch's tensors.

        Args:
            batch: as the graph's inputs have it; of one step they have the recorded shapes.
            tables: scalars of the updates, float64 ``[steps, groups, 16]``; ``None``: no updates.

        Returns:
            The losses, ``[steps]``.

        Raises:
            RunError: a kernel failed.
        """
        if self._whole is not None and self._keeps_losses and self._is_alike(batch):
            losses = torch.empty(steps)
            # Rows may be padded: the next step's are further on than this one's end.
            apart = [len(t) * t.stride(0) * t.element_size() if t.dim() else 0 for t in batch]
            with _drawing_from(self._lowered.random_state):
                self._whole.run(
                    batch,
                    steps,
                    tables=tables,
                    losses=losses,
                    step_bytes=[number // steps for number in apart],
                )
        else:
            losses = self._run_each(batch, tables, steps)
        torch.autograd.graph.increment_version(self._written)
        return losses

    def call(
        self, batch: Sequence[torch.Tensor], tables: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """One step; copies of all outputs of the graph.

        Args:
            batch, tables: as for ``run``.

        Raises:
            RunError: a kernel failed.
        """
        if self._whole is not None and self._is_alike(batch):
            with _drawing_from(self._lowered.random_state):
                self._whole.run(batch, 1, tables=tables)
        else:
            with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
                self._run_actions(batch, None if tables is None else tables[0])
        torch.autograd.graph.increment_version(self._written)
        with torch.no_grad():
            return [self._output(n).clone() for n in range(len(self._lowered.outputs))]

    def _run_actions(self, batch: Sequence[torch.Tensor], table: torch.Tensor | None) -> None:
        for target, source in zip(self._lowered.batch, batch, strict=True):
            target.copy_(source)
        if table is not None:
            for block in self._blocks:
                block.use_table(table.data_ptr(), len(table))
        for action in self._actions:
            action()
        if self._counters:
            torch._foreach_add_(self._counters, 1.0)

    def _run_each(
        self, batch: Sequence[torch.Tensor], tables: torch.Tensor | None, steps: int
    ) -> torch.Tensor:
        losses = torch.empty(steps, dtype=self._lowered.loss_dtype)
        # Below autograd, yet with gradients enabled: else an LSTM keeps nothing for its backward.
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
            for step in range(steps):
                parts = [
                    source[step * len(target) : (step + 1) * len(target)]
                    if steps > 1 and target.dim()
                    else source
                    for target, source in zip(self._lowered.batch, batch, strict=True)
                ]
                self._run_actions(parts, None if tables is None else tables[step])
                losses[step] = self._output(0)
        return losses

    def _output(self, number: int) -> torch.Tensor:
        value = self._lowered.outputs[number]
        tensor: torch.Tensor = self._lowered.late[value.place] if isinstance(value, Late) else value
        return tensor

    def _make_actions(self) -> None:
        calls: list[Call] = []
        rules: list[RuleAt | None] = []
        draws: list[bool] = []

        def flush() -> None:
            if not calls:
                return
            block = Instructions(calls, rules)
            if block.has_rules:
                self._blocks.append(block)
            self._actions.append(self._drawing(block.once) if any(draws) else block.once)
            for entries in (calls, rules, draws):
                entries.clear()

        for number, instruction in enumerate(self._lowered.instructions):
            if isinstance(instruction, Call):
                calls.append(instruction)
                rules.append(self._rule(number))
                draws.append(number in self._lowered.draws)
            else:
                flush()
                self._actions.append(instruction)
        flush()

    def _drawing(self, run: Callable[[], None]) -> Callable[[], None]:
        def run_and_draw() -> None:
            with _drawing_from(self._lowered.random_state):
                run()

        return run_and_draw

    def _rule(self, number: int) -> RuleAt | None:
        group = self._lowered.updates.get(number)
        if group is None:
            return None
        call = self._lowered.instructions[number]
        assert isinstance(call, Call)
        return type(call.arguments).rule.offset, group

    def _is_alike(self, batch: Sequence[torch.Tensor]) -> bool:
        """Whether the batch may be copied as it lies."""
        return all(
            row_strides(source) == row_strides(target) and source.dtype == target.dtype
            for source, target in zip(batch, self._lowered.batch, strict=True)
        )


@contextlib.contextmanager
def _drawing_from(state: torch.Tensor | None) -> Iterator[None]:
    """While it lasts, ``state`` is that of torch's generator; ``None``: nothing is drawn."""
    if state is None:
        yield
        return
    state.copy_(torch.default_generator.get_state())
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def row_strides(tensor: torch.Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element, and of the first one, always."""
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    inner = [s for n, s in zip(sizes, strides, strict=True) if n != 1]
    return [tensor.stride(0) if tensor.dim() else 0, *inner]


def _is_float(loss: Any) -> bool:
    return isinstance(loss, torch.Tensor) and loss.dtype == torch.float32
