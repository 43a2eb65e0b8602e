"""Values looked at in another way: parts of them, other orders, other shapes, without a copy."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Size and distance in floats of each dimension; the batch's size is ``None``.
Dims = tuple[tuple[int | None, int], ...]


@dataclass(frozen=True)
class View:
    """Part of a value, or the same in another order.

    Attributes:
        number: of the value. offset: where it begins, in floats.
        dims: of the batch and of a sample.
    """

    number: int
    offset: int
    dims: Dims

    last = flattened = False

    @property
    def is_dense(self) -> bool:
        """Whether elements lie one after the other, the batch first."""
        return self.dims == dense(tuple(size or 0 for size, _ in self.dims[1:])) and not self.offset


def dense(shape: tuple[int, ...]) -> Dims:
    """The batch, and samples of this shape whose elements lie one after the other."""
    steps = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    return ((None, 0), *zip(shape, steps, strict=True))


def reshaped(dims: Dims, shape: tuple[int, ...]) -> Dims | None:
    """The same elements in the same order in another shape; ``None``: no distances give it."""
    if dims[0][0] is not None:
        return None
    runs: list[tuple[int, int]] = []  # Elements at one distance, the first outermost.
    for size, step in dims[1:]:
        assert size is not None
        if runs and runs[-1][1] == size * step:
            runs[-1] = (runs[-1][0] * size, step)
        elif size > 1:
            runs.append((size, step))
    steps: list[int] = []
    left, step = 1, 1
    for size in reversed(shape):
        if size > 1 and left == 1:
            left, step = runs.pop() if runs else (1, 1)
        if left % size:
            return None
        steps.insert(0, step)
        left, step = left // size, step * size
    return ((None, 0), *zip(shape, steps, strict=True)) if left == 1 and not runs else None
