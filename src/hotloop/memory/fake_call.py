"""A call of a model on other tensors than its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def functional_call(model: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
    """``torch.func.functional_call``, after which recurrent layers too have their own weights.

    They keep a list of them, in which torch would leave ``tensors``.
    """
    try:
        return torch.func.functional_call(model, tensors, (x,))
    finally:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
