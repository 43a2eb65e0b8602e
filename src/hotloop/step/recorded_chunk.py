"""``RecordedChunk``: the chunk of a batch that workers run, recorded from plain steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..graph.from_recording import RecordedGraph, graph_of
from ..graph.recording import NotRecordable, Recording
from .chunk import Chunk, chunk_of, prepare
from .guards import Guards
from .recorded import RecordedStep
from .recorded_shape import Shape, change_of_layout


class RecordedChunk(RecordedStep):
    """As ``RecordedStep``, but what it gives are chunks for workers to run.

    A chunk of the first step and one of the second are recorded; a step after 16, 128, 1,024, ...
    steps of workers runs plain again. ``record``, ``ready`` and ``rehearse`` are asked about
    chunks.

    Args:
        model, loss_fn, optimizer, whole: as for ``RecordedStep``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        whole: bool,
    ) -> None:
        super().__init__(model, loss_fn, optimizer, num_threads=1, whole=whole)

    @property
    def arena_bytes(self) -> int | None:
        """Not known here: each worker has temporaries of its own."""
        return None

    def chunk(self, key: Any) -> Chunk:
        """What workers run, ``ready`` having said so."""
        self._shapes.move_to_end(key)
        chunk = self._shapes[key].chunk
        assert chunk is not None
        return chunk

    def note_steps(self, key: Any, steps: int, reason: str) -> None:
        """Workers made so many steps; they may have moved tensors to other memory for it."""
        shape = self._shapes[key]
        shape.programs_run += steps
        self.reason = reason
        if shape.bound != self._addresses():
            shape.bound = self._addresses()
            # Nothing else changed since ``ready``: no code of the model ran.
            ran = None if shape.guards is None else shape.guards.ran
            shape.guards = Guards(self.model, self.loss_fn, self.optimizer, ran=ran)

    def is_refused(self, key: Any) -> bool:
        """Whether batches of a shape stay plain."""
        return key in self._shapes and self._shapes[key].refusal is not None

    def refuse(self, key: Any, reason: str) -> None:
        """Let batches of a shape stay plain."""
        self._refuse(self._shapes[key], reason)

    def _build(self, shape: Shape, recording: Recording, guards: Guards) -> None:
        kernels.library()  # Chunks are run by its loop, whoever computes them.
        self._ask_judge(recording)
        graph = graph_of(recording)
        if all(g is None for g in graph.gradients):
            raise NotRecordable("no parameter gets a gradient")
        parts = prepare(graph, self._tensors)
        self._optimize(shape, graph)
        shape.graph, shape.guards, shape.bound = graph, guards, None
        change = self._rebind(shape)
        if change is not None:
            raise NotRecordable(change)
        shape.chunk = chunk_of(graph, self._tensors, parts)

    def _rebind(self, shape: Shape) -> str | None:
        """A team finds out by itself where tensors lie; here only how they lie is looked at."""
        graph = shape.graph
        assert graph is not None
        if shape.bound == self._addresses():
            return None
        shape.bound = self._addresses()
        return change_of_layout(graph, self._inputs_of(graph))

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for tensors in self._tensors.values() for t in tensors]

    def _inputs_of(self, graph: RecordedGraph) -> list[torch.Tensor | None]:
        tensors = {**self._tensors, "constant": [tensor for tensor, _ in graph.constants]}
        return [tensors[kind][number] if kind in tensors else None for kind, number in graph.inputs]
