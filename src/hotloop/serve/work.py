"""One request on its way through the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy

from .message import Refusal


class Work:
    """One request on its way through the engine.

    Args:
        arrays: one for each input. rows: of each.
        done: called in the loop's thread with the outputs, or with a refusal.
        arrived_s: monotonic seconds. deadline_s: after which nobody wants the answer.
    """

    __slots__ = (
        "arrays", "arrived_s", "cancelled", "deadline_s", "done", "expected_s", "is_probe", "key",
        "queued_s", "rows", "taken_s",
    )  # fmt: skip

    def __init__(
        self,
        arrays: Sequence[numpy.ndarray],
        rows: int,
        done: Callable[[list[numpy.ndarray] | Refusal], None],
        arrived_s: float,
        deadline_s: float = math.inf,
    ) -> None:
        self.arrays = arrays
        self.rows = rows
        self.done = done
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        # Only tensors of the same shape behind the batch go together.
        self.key = tuple(array.shape[1:] for array in arrays)
        self.queued_s = 0.0
        self.taken_s = 0.0
        self.expected_s = 0.0
        self.cancelled = False
        self.is_probe = False
