"""``ChunkProgram``: a chunk's graph as instructions on the memory of one worker.

Each worker has a program of its own: its own temporaries, its own copy of the chunk's samples and
buffers. What a chunk takes and hands over is copied, so that any worker may run any chunk. The
weights are the one copy that all read. hotloop's kernels run without the interpreter; operations of
ATen between them are functions of Python's, which let go of its lock while they compute.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import kernels
from ..graph.late import Late
from ..graph.lower import Lowered, lower
from ..graph.recording import extent_bytes
from ..kernels import binding
from ..kernels.calls import Call
from ..step.chunk import Chunk, Part

_Entry = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)


@dataclass
class Rows:
    """A row for each chunk of a batch: where chunks find and leave what is theirs.

    Attributes:
        slots: of each weight, what its ``Part`` says: ``[chunks, ...]``.
        copies: of each buffer, what the chunks make of it: ``[chunks, elements]``.
        keys: of the random numbers, int64 ``[chunks, 1]``.
        losses: float32 ``[chunks]``.
    """

    slots: list[list[torch.Tensor]]
    copies: list[torch.Tensor]
    keys: torch.Tensor
    losses: torch.Tensor

    @classmethod
    def of(cls, chunk: Chunk, num_chunks: int) -> Rows:
        """New ones, whose pages nobody has touched."""
        return cls(
            slots=[
                [_slot(num_chunks, shape, weight, part) for shape in part.shapes]
                for weight, part in zip(chunk.tensors["weight"], chunk.parts, strict=True)
            ],
            copies=[
                torch.empty(num_chunks, max(1, b.numel()), dtype=b.dtype)
                for b in chunk.tensors["buffer"]
            ],
            keys=torch.zeros(num_chunks, 1, dtype=torch.int64),
            losses=torch.zeros(num_chunks),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        return [*(s for mine in self.slots for s in mine), *self.copies, self.keys, self.losses]

    @classmethod
    def from_tensors(cls, parts: Sequence[Part], tensors: Sequence[torch.Tensor]) -> Rows:
        """The same made of ``tensors``, in their order there."""
        left = list(tensors)
        slots = [[left.pop(0) for _ in part.shapes] for part in parts]
        *copies, keys, losses = left
        return cls(slots, copies, keys, losses)


def _slot(
    num_chunks: int, shape: tuple[int, ...], weight: torch.Tensor, part: Part
) -> torch.Tensor:
    """Room for what each chunk hands over; a gradient is laid out like its weight."""
    if part.is_factored:
        return torch.empty(num_chunks, *shape)
    stride = (weight.numel(), *weight.stride())
    return torch.empty_strided((num_chunks, *shape), stride)


class ChunkProgram:
    """A chunk on one worker.

    Args:
        chunk: its graph.
        tensors: what its inputs are, by kind, where this process sees them.
        rows: of the batch's chunks.
        scale: of what a chunk hands over for its gradients: its share of the batch.
        batch: where each part of the whole batch lies; ``None``: ``TeamRun`` says so.

    Attributes:
        record: ``binding.ChunkProgram``.
        arena_bytes: of the temporaries whose place is fixed.
        error: what Python raised in an instruction.

    Raises:
        RunError: there are no kernels here.
    """

    def __init__(
        self,
        chunk: Chunk,
        tensors: dict[str, list[torch.Tensor]],
        rows: Rows,
        scale: float,
        batch: Sequence[torch.Tensor] | None = None,
    ) -> None:
        kernels.use_torch()
        self.error: BaseException | None = None
        self._chunk, self._rows, self._scale = chunk, rows, scale
        self._kept: list[Any] = []
        buffers = [torch.empty_like(b) for b in tensors["buffer"]]
        key = torch.zeros(1, dtype=torch.int64)
        own = {**tensors, "buffer": buffers, "key": [key]}
        inputs = [
            None if kind == "batch" else own[kind][number].detach() for kind, number in chunk.inputs
        ]
        lowered = lower(chunk.graph, inputs, 1)
        self.arena_bytes = lowered.arena_bytes
        taken = _batch_copies(lowered.batch, batch)
        for shared, mine in zip(tensors["buffer"], buffers, strict=True):
            taken.append(_copy(shared.data_ptr(), mine.data_ptr(), mine.nbytes))
        taken.append(_copy(rows.keys.data_ptr(), key.data_ptr(), 8, source_step=8))
        given = self._given(lowered, buffers)
        instructions = self._instructions(lowered.instructions)
        arrays = [
            (binding.ChunkCopy * len(taken))(*taken),
            (binding.Instruction * len(instructions))(*instructions),
            given,
        ]
        self._kept += [*arrays, lowered, buffers, key, inputs, tensors, batch]
        self.record = binding.ChunkProgram(
            taken=ctypes.addressof(arrays[0]), num_taken=len(taken), num_batch=len(lowered.batch),
            instructions=ctypes.addressof(arrays[1]), num_instructions=len(instructions),
            given=ctypes.addressof(given), num_given=len(given),
        )  # fmt: skip

    def run(self, number: int) -> None:
        """Run chunk ``number`` of ``batch`` on the calling thread.

        Raises:
            RunError: an instruction failed.
        """
        kernels.call("hotloop_chunk_run", ctypes.byref(self.record), number)

    def _given(self, lowered: Lowered, buffers: Sequence[torch.Tensor]) -> Any:
        """Copies of the loss, of what there is for each weight, and of the buffers."""
        (end,) = (n for n in self._chunk.graph.graph.nodes if n.op == "output")
        rows, scales = [self._rows.losses], [0.0]
        for mine in self._rows.slots:
            rows += mine
            # Of two factors one has the scale.
            scales += [0.0 if self._scale == 1.0 else self._scale, 0.0][: len(mine)]
        pairs = [*zip(rows, scales, strict=True), *((row, 0.0) for row in self._rows.copies)]
        made = (binding.ChunkCopy * len(pairs))()
        for copy, (row, scale) in zip(made, pairs, strict=True):
            copy.target, copy.target_step = row.data_ptr(), row.stride(0) * row.itemsize
            copy.scale = scale
        outputs = zip(lowered.outputs, end.args[0], strict=True)
        for number, (value, node) in enumerate(outputs):
            layout = node.meta["val"]
            made[number].bytes = layout.numel() * layout.element_size()
            if isinstance(value, Late):
                find = functools.partial(_find, lowered.late, value.place, layout, made, number)
                lowered.instructions.append(find)
            else:
                made[number].source = value.data_ptr()
        for number, buffer in enumerate(buffers, len(lowered.outputs)):
            made[number].source, made[number].bytes = buffer.data_ptr(), buffer.nbytes
        return made

    def _instructions(self, found: Sequence[Any]) -> list[Any]:
        """Calls as they are; what lies between two of them is one function of Python's."""
        made: list[Any] = []
        actions: list[Callable[[], Any]] = []

        def flush() -> None:
            if actions:
                made.append(binding.Instruction(self._function(list(actions)), None, None, 0))
                actions.clear()

        for each in found:
            if isinstance(each, Call):
                flush()
                made.append(
                    binding.Instruction(each.entry_address, each.arguments_address, None, 0)
                )
            else:
                actions.append(each)
        flush()
        return made

    def _function(self, actions: list[Callable[[], Any]]) -> int | None:
        """The address of a function that runs the actions below autograd."""

        def run(_: Any) -> int:
            try:
                # With gradients enabled: else an LSTM keeps nothing for its backward.
                with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
                    for action in actions:
                        action()
            except BaseException as error:
                self.error = error
                words = f"{type(error).__name__}: {error}"
                kernels.library().hotloop_set_error(words.encode(errors="replace"))
                return 1
            return 0

        entry = _Entry(run)
        self._kept.append(entry)
        return ctypes.cast(entry, ctypes.c_void_p).value


def _find(late: list[Any], place: int, layout: torch.Tensor, copies: Any, number: int) -> None:
    """Tell a copy where a value lies that has a place only now."""
    value = late[place]
    if value.stride() != layout.stride():
        empty = torch.empty_strided(layout.shape, layout.stride(), dtype=layout.dtype)
        value = late[place] = empty.copy_(value)
    copies[number].source = value.data_ptr()


def _batch_copies(
    targets: Sequence[torch.Tensor], batch: Sequence[torch.Tensor] | None
) -> list[Any]:
    """A copy of a chunk's samples for each part of the batch; chunks follow each other there."""
    made = []
    for number, target in enumerate(targets):
        source = None if batch is None else batch[number].data_ptr()
        step = len(target) * target.stride(0) * target.itemsize
        made.append(_copy(source, target.data_ptr(), extent_bytes(target), source_step=step))
    return made


def _copy(source: int | None, target: int, size: int, *, source_step: int = 0) -> Any:
    return binding.ChunkCopy(source=source, target=target, bytes=size, source_step=source_step)
