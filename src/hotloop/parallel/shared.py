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

    def view(self, block: mmap.mmap) -> torch.Tensor:
        """The tensor in a block: a storage of its own, so that nothing takes two for one."""
        count = _bytes(self.shape, self.stride, self.dtype) // self.dtype.itemsize
        if count == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        flat = torch.frombuffer(block, dtype=self.dtype, count=count, offset=self.offset)
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


def opened(descriptor: int, num_bytes: int) -> mmap.mmap:
    """The block; its tensors keep the mapping."""
    return mmap.mmap(descriptor, num_bytes)


def _bytes(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    if 0 in shape:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * dtype.itemsize
