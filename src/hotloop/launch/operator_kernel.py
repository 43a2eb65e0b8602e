"""How an operator of torch's is taken over by a kernel, and the tensors that kernels take."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

# Makes the results, laid out as torch's.
Make = Callable[[], Any]


@dataclass(frozen=True)
class Kernel:
    """How an operator is taken over.

    Attributes:
        name: of torch's, such as ``"convolution"``.
        take: called as the operator; what makes its results with a key of the shapes, or ``None``
            where the call is torch's.
    """

    name: str
    take: Callable[..., tuple[Hashable, Make] | None]


def is_plain(tensor: Any, dim: int) -> bool:
    """Whether it is float32 with so many dimensions, laid out in their order without gaps."""
    if tensor.dtype is not torch.float32 or tensor.dim() != dim or tensor.layout != torch.strided:
        return False
    if tensor.is_neg() or not tensor.numel() or not tensor.is_contiguous():
        return False
    # torch calls sizes of 1 contiguous whatever their stride; what it makes of them may follow it.
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True
