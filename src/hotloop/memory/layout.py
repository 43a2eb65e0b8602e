"""Where the rows of one batch tensor lie: aligned start, aligned stride, one contiguous block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import InputError


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``count``."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class BatchLayout:
    """Rows of one tensor in one block, start and stride aligned to the cache line.

    A row that starts on a cache line shares no line with its neighbour, so two threads that fill
    neighbouring rows never fight over one, and vector loads never straddle two.

    Rows of shape ``()`` (one scalar a row: class labels, weights) are packed densely and only the
    start is aligned: padding each 8-byte label to a 64-byte line would read eight times the memory
    for it, and losses want labels contiguous.

    Args:
        num_rows: rows in the block, the batch size; at least 1.
        row_shape: shape of one row without the batch dimension, every size at least 1.
        dtype: element type.
        line_bytes: cache line of the machine; a power of two no smaller than one element.
        padded: ``False`` packs all rows densely and aligns the start alone: a contiguous tensor.

    Raises:
        InputError: a size is outside its rule.
    """

    num_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    line_bytes: int = 64
    padded: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_shape", tuple(int(size) for size in self.row_shape))
        if self.num_rows < 1:
            raise InputError("num_rows of a BatchLayout must be at least 1", got=self.num_rows)
        if any(size < 1 for size in self.row_shape):
            raise InputError("every size in row_shape must be at least 1", got=self.row_shape)
        if self.line_bytes < 1 or self.line_bytes & (self.line_bytes - 1):
            raise InputError("line_bytes must be a power of two", got=self.line_bytes)
        if self.line_bytes < self.dtype.itemsize:
            raise InputError(
                f"line_bytes must be at least the {self.dtype.itemsize} bytes of one {self.dtype}",
                got=self.line_bytes,
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of the elements of one row, without padding."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def stride_bytes(self) -> int:
        """Bytes from the start of one row to the start of the next."""
        padded = self.padded and self.row_shape
        return round_up(self.row_bytes, self.line_bytes) if padded else self.row_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the block: all rows with their padding, a multiple of the line."""
        return round_up(self.num_rows * self.stride_bytes, self.line_bytes)

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor of shape ``[num_rows, *row_shape]`` that lies in a block.

        Elements of one row are contiguous; rows are ``stride_bytes`` apart, so that the tensor is
        contiguous exactly where a row fills its lines.

        Args:
            block: one-dimensional uint8 tensor of at least ``total_bytes``, whose first byte is
                aligned to ``line_bytes``. The view shares its memory and keeps it alive.

        Raises:
            InputError: the block is of another kind, too small, or not aligned.
        """
        if block.dtype != torch.uint8 or block.ndim != 1 or not block.is_contiguous():
            raise InputError(
                "a block must be a contiguous one-dimensional uint8 tensor",
                got=f"{block.dtype} of shape {tuple(block.shape)}",
            )
        if block.numel() < self.total_bytes:
            raise InputError(
                f"a block for this layout needs {self.total_bytes} bytes", got=block.numel()
            )
        if block.data_ptr() % self.line_bytes:
            raise InputError(
                f"a block must start on a line of {self.line_bytes} bytes",
                got=f"address {block.data_ptr():#x}",
            )
        stride = self.stride_bytes // self.dtype.itemsize
        row_numel = math.prod(self.row_shape)
        elements = block[: self.num_rows * self.stride_bytes].view(self.dtype)
        rows = elements.view(self.num_rows, stride)[:, :row_numel]
        return rows.view(self.num_rows, *self.row_shape)
