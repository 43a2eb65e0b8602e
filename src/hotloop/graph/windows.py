"""Windows over images, of convolutions and pooling. Imports no torch."""

from __future__ import annotations

from typing import Any


def pair(sizes: Any) -> tuple[int, int]:
    """Two sizes, of two or of one for both."""
    first, second = [*sizes, *sizes][:2] if isinstance(sizes, (list, tuple)) else (sizes, sizes)
    return int(first), int(second)


def is_small_filter(kernel: Any, stride: Any, padding: Any) -> bool:
    """Whether ``kernels/cpp/convolution.h`` takes it: up to 7x7, stride 1, padding less than that.

    1x1 is not among them: it is a matrix product.
    """
    sizes = pair(kernel)
    pads = zip(pair(padding), sizes, strict=True)
    fits = 1 < max(sizes) <= 7 and all(pad < size for pad, size in pads)
    return fits and pair(stride) == (1, 1)


def is_3x3(kernel: Any, stride: Any, padding: Any) -> bool:
    """Whether it is one of these by 3x3, for which a layer of inference has filters prepared."""
    return pair(kernel) == (3, 3) and is_small_filter(kernel, stride, padding)
