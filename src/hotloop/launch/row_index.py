"""Which rows of which tensors can be looked up at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def index_of(places: Sequence[int], count: int) -> torch.Tensor | None:
    """The index of these rows; ``None``: not all are plain numbers of a row."""
    if not all(type(place) is int and 0 <= place < count for place in places):
        return None
    return torch.tensor(places)


def is_plain(tensor: Any) -> bool:
    """Whether rows of it can be looked up: a dense tensor on the CPU, without gradient."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.dim() > 0
        and not tensor.requires_grad
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
