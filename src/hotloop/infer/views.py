"""Values looked at in another way: parts of them, other orders, other shapes, without a copy.

A dimension of a view is a group of runs, outermost first, each of so many elements at one distance;
one of them is the batch. So dimensions can be merged and parted again in any order, the batch among
them, as ``nn.MultiheadAttention`` does it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

# Size and distance in floats; the batch is ``BATCH``.
Run = tuple[int | None, int]
BATCH: Run = (None, 0)
# What a dimension holds: whether the batch, and how many elements of a sample.
Wanted = tuple[bool, int]


@dataclass(frozen=True)
class View:
    """Part of a value, or the same in another order.

    Attributes:
        number: of the value. offset: where it begins, in floats.
        dims: a group of runs for each dimension; none where its size is 1.
    """

    number: int
    offset: int
    dims: tuple[tuple[Run, ...], ...]

    last = flattened = False

    @classmethod
    def dense(cls, number: int, shape: Sequence[int]) -> View:
        """The batch, and samples of this shape whose elements lie one after the other."""
        steps = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        runs = [((n, s),) if n > 1 else () for n, s in zip(shape, steps, strict=True)]
        return cls(number, 0, ((BATCH,), *runs))

    @property
    def is_dense(self) -> bool:
        """Whether elements lie one after the other, the batch first."""
        runs = merged([run for group in self.dims[1:] for run in group])
        return self.dims[0] == (BATCH,) and not self.offset and (not runs or is_last(runs))

    @property
    def elements(self) -> int:
        """Of a sample."""
        return math.prod(size for group in self.dims for size, _ in group if size is not None)

    def permuted(self, order: Sequence[int]) -> View:
        """Its dimensions in this order."""
        return replace(self, dims=tuple(self.dims[d] for d in order))

    def part(self, dim: int, start: int, count: int | None) -> View | None:
        """``count`` from ``start`` on; ``None``: one, and the dimension goes."""
        run = single(self.dims[dim])
        if run is None:
            return None
        size, step = run
        kept = () if count is None else (((count, step),) if count > 1 else (),)
        dims = (*self.dims[:dim], *kept, *self.dims[dim + 1 :])
        return replace(self, offset=self.offset + start % size * step, dims=dims)

    def reshaped(self, shape: Sequence[Wanted]) -> View | None:
        """The same elements in the same order in other dimensions; ``None``: no runs give it."""
        left = merged([run for group in self.dims for run in group])
        dims: list[tuple[Run, ...]] = []
        for batch, count in shape:
            group: list[Run] = []
            while batch or count > 1:
                if not left:
                    return None
                size, step = left.pop(0)
                if size is None:
                    if not batch:
                        return None
                    batch = False
                    group.append(BATCH)
                elif count % size == 0:
                    count //= size
                    group.append((size, step))
                elif size % count == 0 and not (batch and BATCH in left):
                    group.append((count, step * (size // count)))
                    left.insert(0, (size // count, step))
                    count = 1
                else:
                    return None
            dims.append(tuple(group))
        return None if left else replace(self, dims=tuple(dims))

    def heads(self) -> tuple[int, int, int, int] | None:
        """Of ``[batch, heads, rows, elements]``: value, begin, how far heads and rows are apart."""
        if len(self.dims) != 4 or self.dims[0] != (BATCH,):
            return None
        head, row, element = (single(group) for group in self.dims[1:])
        if head is None or row is None or element is None or element[1] > 1:
            return None
        return self.number, self.offset, head[1], row[1]

    def rows(self, elements: int) -> bool:
        """Whether it is a value's dense rows of so many elements, in whatever order they stand."""
        if self.offset or merged(self.dims[-1]) != [(elements, 1)]:
            return False
        runs = [run for group in self.dims[:-1] for run in group if run != BATCH]
        runs = sorted(((n or 0, s) for n, s in runs), key=lambda run: -run[1])
        return is_last(merged([*runs, (elements, 1)]))

    def with_rows(self, number: int, before: int, after: int) -> View:
        """The same rows of another value, of ``after`` elements where there were ``before``."""
        dims = tuple(
            tuple(run if run == BATCH else (run[0], run[1] // before * after) for run in group)
            for group in self.dims[:-1]
        )
        return View(number, 0, (*dims, ((after, 1),) if after > 1 else ()))


def merged(runs: Sequence[Run]) -> list[Run]:
    """Runs that continue each other as one."""
    found: list[Run] = []
    for size, step in runs:
        if found and None not in (size, found[-1][0]) and found[-1][1] == (size or 0) * step:
            found[-1] = ((found[-1][0] or 0) * (size or 0), step)
        else:
            found.append((size, step))
    return found


def is_last(runs: Sequence[Run]) -> bool:
    """Whether it is one run of elements side by side."""
    return len(runs) == 1 and runs[0][0] is not None and runs[0][1] == 1


def single(group: Sequence[Run]) -> tuple[int, int] | None:
    """The size and distance of a dimension; ``None``: it has no single one, or holds the batch."""
    runs = merged(group)
    if not runs:
        return 1, 0
    size, step = runs[0]
    return None if len(runs) > 1 or size is None else (size, step)
