"""Convolutions of a launched script by hotloop's kernels, forward and backward.

The kernels want channels adjacent and the script gets them in planes, as torch gives them: images
are turned on the way in and out, which takes less time than Winograd's transforms save.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..kernels import calls
from .operator_kernel import Kernel, Make, is_plain

# Multiply-adds below which the call costs more than it can save.
_LEAST_WORK = 1 << 20
_LARGEST_FILTER = 7


def is_exact() -> bool:
    """Whether torch convolves float32 in float32, and oneDNN is not switched off."""
    backend: Any = torch.backends.mkldnn
    return bool(backend.enabled) and backend.conv.fp32_precision in ("none", "ieee")


def _fits(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> bool:
    """Whether the kernels make this convolution of images in planes."""
    if transposed or groups != 1 or list(stride) != [1, 1] or list(dilation) != [1, 1]:
        return False
    if not (is_plain(x, 4) and is_plain(weight, 4)) or x.shape[1] != weight.shape[1]:
        return False
    sizes = [
        (size + 2 * pad - taps + 1, taps, pad)
        for size, taps, pad in zip(x.shape[2:], weight.shape[2:], padding, strict=True)
    ]
    if any(not 0 <= p < k <= _LARGEST_FILTER or made < 1 for made, k, p in sizes):
        return False
    work = x.shape[0] * weight.numel() * sizes[0][0] * sizes[1][0]
    return work >= _LEAST_WORK and is_exact()


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> tuple[Hashable, Make] | None:
    pads = list(padding) * (2 if len(padding) == 1 else 1)
    if len(pads) != 2 or not _fits(x, weight, stride, pads, dilation, transposed, groups):
        return None
    outputs = weight.shape[0]
    if bias is not None and (not is_plain(bias, 1) or len(bias) != outputs):
        return None
    threads = torch.get_num_threads()
    (n, _, h, w), (_, _, kh, kw), (ph, pw) = x.shape, weight.shape, pads

    def make() -> torch.Tensor:
        out = _channels_last((n, outputs, h + 2 * ph - kh + 1, w + 2 * pw - kw + 1))
        calls.convolve(
            _turned(x, threads), weight, bias, out, padding=(ph, pw), num_threads=threads
        )()
        return _planes(out, threads)

    return (x.shape, weight.shape, ph, pw, bias is None, threads), make


def _convolution_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Hashable, Make] | None:
    pads = list(padding) * (2 if len(padding) == 1 else 1)
    if len(pads) != 2 or not _fits(x, weight, stride, pads, dilation, transposed, groups):
        return None
    if not is_plain(gradient, 4):
        return None
    threads = torch.get_num_threads()
    ph, pw = pads
    wants_x, wants_weight, wants_bias = output_mask
    if wants_bias and not wants_weight:
        return None

    def make() -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        turned = _turned(gradient, threads)
        of_x = of_weight = of_bias = None
        if wants_x:
            of_x = _channels_last(x.shape)
            calls.convolve_input_gradient(
                turned, weight, of_x, padding=(ph, pw), num_threads=threads
            )()
            of_x = _planes(of_x, threads)
        if wants_weight:
            of_weight = torch.empty(weight.shape, dtype=torch.float32)
            of_bias = torch.empty(len(weight), dtype=torch.float32)
            calls.convolve_filter_gradient(
                _turned(x, threads), turned, of_weight, of_bias, padding=(ph, pw),
                num_threads=threads,
            )()  # fmt: skip
        return of_x, of_weight, of_bias if wants_bias else None

    return (x.shape, weight.shape, ph, pw, *output_mask, threads), make


def _channels_last(shape: Sequence[int]) -> torch.Tensor:
    _, c, h, w = shape
    # By strides: torch would take images of one channel or pixel for planes.
    return torch.empty_strided(shape, (h * w * c, 1, w * c, c), dtype=torch.float32)


def _turned(x: torch.Tensor, threads: int) -> torch.Tensor:
    """The images with their channels adjacent."""
    made = _channels_last(x.shape)
    if x.shape[1] == 1:
        return x.as_strided(x.shape, made.stride())
    calls.copy(x, made, num_threads=threads)()
    return made


def _planes(x: torch.Tensor, threads: int) -> torch.Tensor:
    """The images in planes, as torch gives them."""
    _, c, h, w = x.shape
    planes = (c * h * w, h * w, w, 1)
    if c == 1:
        return x.as_strided(x.shape, planes)
    made = torch.empty_strided(x.shape, planes, dtype=torch.float32)
    calls.copy(x, made, num_threads=threads)()
    return made


KERNELS = (
    Kernel("convolution", _convolution),
    Kernel("convolution_backward", _convolution_backward),
)
