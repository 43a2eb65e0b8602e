"""Max pooling of a launched script by hotloop's kernel: the same bits, without torch's branches."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from ..kernels import calls
from .operator_kernel import Kernel, Make, is_plain

# Pixels read below which the call costs more than it can save.
_LEAST_WORK = 1 << 15


def _max_pool(
    x: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Hashable, Make] | None:
    if ceil_mode or any(d != 1 for d in dilation) or not is_plain(x, 4):
        return None
    kernel, pads = _pair(kernel_size), _pair(padding)
    steps = _pair(stride) if stride else kernel
    if any(
        2 * p > k or k < 1 or p < 0 or s < 1 for k, p, s in zip(kernel, pads, steps, strict=True)
    ):
        return None  # torch's error.
    n, c, h, w = x.shape
    oh, ow = (
        (size + 2 * p - k) // s + 1
        for size, p, k, s in zip((h, w), pads, kernel, steps, strict=True)
    )
    if oh < 1 or ow < 1 or n * c * oh * ow * kernel[0] * kernel[1] < _LEAST_WORK:
        return None
    threads = torch.get_num_threads()

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty((n, c, oh, ow), dtype=torch.float32)
        indices = torch.empty((n, c, oh, ow), dtype=torch.int64)
        calls.pool_planes(
            x, out, indices, kernel=kernel, stride=steps, padding=pads, num_threads=threads
        )()
        return out, indices

    return (x.shape, kernel, steps, pads, threads), make


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    return (sizes[0], sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


KERNELS = (Kernel("max_pool2d_with_indices", _max_pool),)
