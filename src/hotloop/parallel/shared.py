"""``SharedBlock``: tensors that several processes see, in one mapping."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..memory.layout import round_up

_LINE_BYTES = 64


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a block, and how."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in uint8 ``block``."""
        size = _bytes(self.shape, self.stride, self.dtype)
        flat = block[self.offset : self.offset + size].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


def places(tensors: Sequence[torch.Tensor]) -> tuple[list[Place], int]:
    """A place for each tensor, one after the other on cache lines; and the bytes of all."""
    found, end = [], 0
    for t in tensors:
        found.append(Place(end, tuple(t.shape), t.stride(), t.dtype))
        end = round_up(end + _bytes(t.shape, t.stride(), t.dtype), _LINE_BYTES)
    return found, max(end, _LINE_BYTES)


def create(num_bytes: int) -> int:
    """Descriptor of a new block without a name; it goes when the last process lets go of it."""
    descriptor = os.memfd_create("hotloop-workers")
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def opened(descriptor: int, num_bytes: int) -> torch.Tensor:
    """The block as a uint8 tensor, which keeps the mapping."""
    return torch.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=torch.uint8)


def _bytes(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    if 0 in shape:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * dtype.itemsize
