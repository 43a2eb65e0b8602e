"""What a run took, in the words of its budget: the prediction is checked against it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..memory import TensorArena
from ..memory.budget import model_bytes
from ..monitor import peak_resident_bytes
from .loop import TrainLoop


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Counted when a run has ended.

    Attributes:
        peak_resident_bytes: of the process over the run; ``None``: the kernel does not tell.
        arena: statistics of the tensor arena; ``None``: the system allocator was used.
        components: by the names of ``Budget``, those that can be counted: parameters, batch data,
            optimizer state.
    """

    peak_resident_bytes: int | None
    arena: dict[str, int] | None
    components: dict[str, int]

    def prediction_error(self, total_bytes: int | None) -> float | None:
        """Predicted over measured, less 1; ``None``: one of them is not known."""
        if not total_bytes or not self.peak_resident_bytes:
            return None
        return total_bytes / self.peak_resident_bytes - 1


def memory_use(loop: TrainLoop, arena: TensorArena | None, resident_bytes: int) -> MemoryUse:
    """Count; ``resident_bytes``: of samples that stay in memory."""
    return MemoryUse(
        peak_resident_bytes=peak_resident_bytes(),
        arena=None if arena is None else dataclasses.asdict(arena.stats()),
        components={
            "model_parameters_bytes": model_bytes(loop.model),
            "batch_data_bytes": (loop.pool.total_bytes if loop.pool else 0) + resident_bytes,
            "optimizer_state_bytes": _optimizer_bytes(loop.optimizer),
        },
    )


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
