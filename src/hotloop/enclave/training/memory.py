"""The tensors of a training export, and the arena of its programs, where they lie. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from .document import Laid, Tensor
from .instructions import Reader, Space

_LINE_BYTES = 64


def block_of(size_bytes: int) -> numpy.ndarray:
    """So many bytes, zero, from a cache line on. Pages that nobody touches take no memory."""
    whole = numpy.zeros(size_bytes + _LINE_BYTES, numpy.uint8)
    start = -whole.ctypes.data % _LINE_BYTES
    return whole[start : start + size_bytes]


def view(
    block: numpy.ndarray, dtype: str, shape: tuple[int, ...], strides: Sequence[int], at: int = 0
) -> numpy.ndarray:
    """An array of a block's memory; strides in elements."""
    of = numpy.dtype(dtype)
    return numpy.ndarray(shape, of, block, at, [n * of.itemsize for n in strides])


class Memory:
    """Memory for all that a program uses.

    Args:
        tensors: of the document.
        arena_bytes: of the largest program.

    Attributes:
        arrays: of each tensor, an array of its shape and strides.
        arena: bytes that one program at a time uses.
    """

    def __init__(self, tensors: Sequence[Tensor], arena_bytes: int) -> None:
        self.arena = block_of(max(arena_bytes, _LINE_BYTES))
        self._tensors = tensors
        self._blocks = [block_of(t.count * numpy.dtype(t.dtype).itemsize) for t in tensors]
        self.arrays = [
            view(block, t.dtype, t.shape, t.strides)
            for block, t in zip(self._blocks, tensors, strict=True)
        ]

    @property
    def size_bytes(self) -> int:
        """Of all of it."""
        return self.arena.nbytes + sum(block.nbytes for block in self._blocks)

    def spaces(self, arena_bytes: int) -> list[Space]:
        """For ``instructions.Reader``: the arena as one program sees it, then the tensors."""
        found = [Space(self.arena.ctypes.data, arena_bytes)]
        found += [
            Space(block.ctypes.data, block.nbytes, tensor.kind != "constant")
            for block, tensor in zip(self._blocks, self._tensors, strict=True)
        ]
        return found

    def laid(self, reader: Reader, at: Laid, *, written: bool = False) -> numpy.ndarray:
        """An array where a document says that a tensor lies.

        Raises:
            Refused: it is not inside its space.
        """
        itemsize = numpy.dtype(at.dtype).itemsize
        reach = 1 + sum((n - 1) * s for n, s in zip(at.shape, at.strides, strict=True))
        reader.address(at.place, reach * itemsize, written=written)
        number, offset = at.place
        block = self.arena if number == 0 else self._blocks[number - 1]
        return view(block, at.dtype, at.shape, at.strides, offset)
