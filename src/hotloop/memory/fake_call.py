"""A call of a model on other tensors than its own, which leaves nothing in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def functional_call(model: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
    """``torch.func.functional_call``, after which the attributes of all modules are as before.

    A model may keep what it makes in its first call (positions, masks), and recurrent layers keep a
    list of their weights: none of it may be made of ``tensors``.
    """
    held = [_contents(module) for module in model.modules()]
    try:
        return torch.func.functional_call(model, tensors, (x,))
    finally:
        for contents in held:
            for container, before in contents:
                container.clear()
                container.update(before) if isinstance(before, dict) else container.extend(before)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dicts and lists of a module, its attributes among them, and what is in each."""
    attributes = vars(module)
    found = [value for value in attributes.values() if type(value) in (dict, list)]
    return [(container, container.copy()) for container in (attributes, *found)]
