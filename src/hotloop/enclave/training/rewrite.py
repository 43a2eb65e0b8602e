"""Layers of a copy of the model, said in operations that hotloop's kernels make.

Only for the recording of an export: weights stay the same parameters, results the same to rounding.

- A 1x1 convolution is a product over the channels.
- A convolution with a stride of 2 is one with a stride of 1, of whose results every other one is
  kept: four times the work of that layer, but no other library's.
- Batch norm in evaluation is a chain of element-wise operations.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def rewrite_convolutions(model: nn.Module) -> None:
    """Change the ``forward`` of convolutions that no kernel makes as they are, in place."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _can_be(module):
            _replace_forward(module, _convolved)


def rewrite_batch_norms(model: nn.Module) -> None:
    """Change the ``forward`` of batch norms to that by their running statistics, in place."""
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS) and module.running_mean is not None:
            _replace_forward(module, _by_running_statistics)


def _replace_forward(module: Any, forward: Any) -> None:
    module.forward = functools.partial(forward, module)


def _can_be(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str) or conv.stride not in ((1, 1), (2, 2)):
        return False
    is_product = conv.kernel_size == (1, 1) and conv.padding == (0, 0)
    return is_product or (conv.stride == (2, 2) and max(conv.kernel_size) > 1)


def _convolved(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The convolution; sizes that are no multiple of the stride are left to torch."""
    halves = conv.stride == (2, 2)
    if conv.kernel_size == (1, 1):
        if halves and (x.shape[2] % 2 or x.shape[3] % 2):
            return _plain(conv, x, conv.stride)
        channels_last = x.permute(0, 2, 3, 1)
        if halves:
            channels_last = _every_other(channels_last)
        y = functional.linear(channels_last, conv.weight.flatten(1), conv.bias)
        return y.permute(0, 3, 1, 2)
    y = _plain(conv, x, (1, 1))
    if y.shape[2] % 2 or y.shape[3] % 2:
        return _plain(conv, x, conv.stride)
    return _every_other(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _plain(conv: nn.Conv2d, x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    return functional.conv2d(x, conv.weight, conv.bias, stride, conv.padding)


def _every_other(images: torch.Tensor) -> torch.Tensor:
    """Rows 0, 2, 4, ... and columns 0, 2, 4, ... of ``[n, h, w, c]``."""
    n, h, w, c = images.shape
    return images.reshape(n, h // 2, 2, w // 2, 2, c)[:, :, 0, :, 0].contiguous()


def _by_running_statistics(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean * scale
    if norm.bias is not None:
        offset = offset + norm.bias
    shape = (1, -1, *[1] * (x.dim() - 2))
    return x * scale.view(shape) + offset.view(shape)
