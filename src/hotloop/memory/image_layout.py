"""Images with channels adjacent, which is how convolutions like them.

One channel is adjacent to nothing, so both layouts describe the same memory. torch would take the
dense one and lay out, or turn, every result for the convolutions that follow accordingly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from .preserve import preserved


def adjacent(x: torch.Tensor) -> torch.Tensor:
    """The same memory, ``[batch, 1, height, width]``, with the strides of channels last."""
    return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))


def turned(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``[batch, channels, height, width]`` with channels adjacent."""
    return x.contiguous(memory_format=torch.channels_last)


def may_be_adjacent(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether ``x`` is a batch of one-channel images that the model convolves."""
    return _convolves(model, x) and x.shape[1] == 1


def preferred(model: nn.Module, x: Any, *, copies: bool = False) -> Callable[[Any], Any]:
    """``adjacent`` where the model gains from it and can take it, else the identity.

    A model may ask for a layout (``view`` of what a convolution gives), so its forward pass is
    tried on fake tensors. Nothing of the model changes.

    Args:
        model: any. x: a batch; only its shape, strides and dtype count. Of a tree nothing is
            laid out in another way.
        copies: ``turned`` too, for images of several channels: a copy of the batch, for layers
            that then all have the layout that compiled convolutions want.
    """
    if not isinstance(x, torch.Tensor):
        return _as_it_is
    layout = adjacent if may_be_adjacent(model, x) else turned
    if not _convolves(model, x) or (layout is turned and not (copies and _gains(model))):
        return _as_it_is
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    try:
        with preserved(model), FakeTensorMode(), torch.no_grad():
            # Not `from_tensor`, which imports torch's compiler.
            fakes: Any = {
                name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
                for name, t in tensors.items()
            }
            image = layout(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype))
            with _Strides() as asked:
                torch.func.functional_call(model, fakes, (image,))
        if asked.reads_memory:
            return _as_it_is
    except Exception:  # Whatever the model does not like: it gets what it was written for.
        return _as_it_is
    return layout


class _Strides(TorchDispatchMode):
    """Notes whether a model reads memory by its own strides: another layout gives other values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads_memory = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.reads_memory |= func.overloadpacket is torch.ops.aten.as_strided
        return func(*args, **(kwargs or {}))


def _convolves(model: nn.Module, x: torch.Tensor) -> bool:
    dense_images = x.dim() == 4 and len(x) > 0 and x[0].is_contiguous()
    return dense_images and any(isinstance(m, nn.Conv2d) for m in model.modules())


def _gains(model: nn.Module) -> bool:
    """Whether a convolution does more than cut an image into patches, as those of a ViT do."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return any(m.stride != m.kernel_size or m.kernel_size == (1, 1) for m in layers)


def _as_it_is(x: Any) -> Any:
    return x
