"""What a kernel allocates inside itself, which a trace of operators does not show.

oneDNN computes convolutions on blocked layouts. A tensor in PyTorch's plain layout is copied into
one before, and the result copied back after. The copies below, and their order, are those that
``TensorArena.recording`` shows for torch 2.13 on x86 with AVX-512; a tensor with fewer than 8
channels is read as it is, and channels-last tensors are never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Channels from which oneDNN blocks a tensor.
_BLOCKED_CHANNELS = 8


Allocate = Callable[[int], Callable[[], None]]
Note = Callable[[torch.Tensor], None]


def note_with_scratch(name: str, args: Any, result: Any, allocate: Allocate, note: Note) -> bool:
    """Note the results of an operation and the scratch of its kernel, in the kernel's order.

    Args:
        name: schema name, such as ``"aten::convolution"``.
        args, result: of the operation.
        allocate: notes so many bytes of scratch and returns what notes their release.
        note: notes a result.

    Returns:
        ``False``: the operation takes no scratch, and nothing was noted.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if name == "aten::convolution" and _is_copied(args[0]):
        _forward(args[0], result, allocate, note)
        return True
    if name == "aten::convolution_backward" and _is_copied(args[1]):
        _backward(args[0], args[1], result, allocate, note)
        return True
    if name == "aten::max_pool2d_with_indices_backward" and _is_adjacent(args[1]):
        note(result)
        # The indices laid out like the image, and the gradient once more.
        frees = [allocate(_bytes(args[-1])), allocate(_bytes(result))]
        for free in frees:
            free()
        return True
    return False


def _forward(
    source: torch.Tensor,
    result: torch.Tensor,
    allocate: Allocate,
    note: Note,
) -> None:
    free_source = allocate(_blocked_bytes(source))
    free_blocked = allocate(_bytes(result))
    free_source()
    note(result)
    free_blocked()


def _backward(
    gradient: torch.Tensor,
    source: torch.Tensor,
    results: Any,
    allocate: Allocate,
    note: Note,
) -> None:
    of_source, *others = results
    if of_source is not None:
        free_gradient = allocate(_bytes(gradient))
        free_blocked = allocate(_blocked_bytes(source))
        free_gradient()
        note(of_source)
        free_blocked()
    frees = [allocate(_bytes(gradient)), allocate(_blocked_bytes(source))]
    for tensor in others:
        if tensor is not None:
            note(tensor)
    for free in frees:
        free()


def _is_copied(tensor: torch.Tensor) -> bool:
    plain = tensor.is_contiguous() and not _is_adjacent(tensor)
    return tensor.dtype == torch.float32 and tensor.dim() in (3, 4, 5) and plain


def _is_adjacent(tensor: torch.Tensor) -> bool:
    """Whether an image says that its channels are adjacent; one channel may."""
    return tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.shape[2:].numel() > 1


def _blocked_bytes(tensor: torch.Tensor) -> int:
    return _bytes(tensor) if tensor.shape[1] >= _BLOCKED_CHANNELS else 0


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
