"""Windows over images, of convolutions and pooling. Imports no torch."""

from __future__ import annotations

from typing import Any


def pair(sizes: Any) -> tuple[int, int]:
    """Two sizes, of two or of one for both."""
    first, second = [*sizes, *sizes][:2] if isinstance(sizes, (list, tuple)) else (sizes, sizes)
    return int(first), int(second)


def is_small_filter(kernel: Any, stride: Any, padding: Any) -> bool:
    """Whether ``kernels/cpp/convolution.h`` takes it: 3x3, stride 1, padding of 2 at most."""
    return pair(kernel) == (3, 3) and pair(stride) == (1, 1) and max(pair(padding)) <= 2
