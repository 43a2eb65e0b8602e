"""What follows a layer and is taken along: batch norm, relu or gelu, pooling by 2x2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import ModelError

_aten = torch.ops.aten
RELUS = (_aten.relu.default, _aten.relu_.default)
ACTS = (*RELUS, _aten.gelu.default)


class Following:
    """The operators of a graph that layers before them have taken along.

    Args:
        constant: the tensor behind a node that stands for a weight; ``None`` for ``None``.

    Attributes:
        taken: those operators.
    """

    def __init__(self, constant: Callable[[Any], torch.Tensor | None]) -> None:
        self.taken: set[fx.Node] = set()
        self._constant = constant

    def next(self, node: Any) -> Any:
        """The only reader of a value; ``None``: there are more, or it is a result."""
        users = [user for user in node.users if user.op != "output"]
        return users[0] if len(node.users) == len(users) == 1 else None

    def take(self, node: Any) -> Any:
        """This node is another layer's from now on."""
        self.taken.add(node)
        return node

    def act(self, node: Any, allowed: Sequence[Any]) -> tuple[Any, str]:
        """The last node then, and what follows by its name in the network."""
        user = self.next(node)
        if user is not None and user.target in allowed and (act := act_of(user)) is not None:
            return self.take(user), act
        return node, "none"

    def pool(self, node: Any) -> Any:
        """The pooling by 2x2 that follows, or ``None``."""
        user = self.next(node)
        if user is None or user.target is not _aten.max_pool2d.default:
            return None
        defaults: tuple[Any, ...] = (None, 2, (), 0, 1, False)
        given = tuple(user.args)
        _, kernel, stride, padding, dilation, ceil_mode = given + defaults[len(given) :]
        halves = pair(kernel) == pair(stride or kernel) == (2, 2)
        plain = pair(padding) == (0, 0) and pair(dilation) == (1, 1) and not ceil_mode
        return self.take(user) if halves and plain else None

    def norm(
        self, node: Any, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """Weights with the batch norm that follows (in eval mode) worked in."""
        user = self.next(node)
        if user is None or user.target is not _aten.batch_norm.default or user.args[0] is not node:
            return node, weight, bias
        gamma, beta, mean, variance = (self._constant(n) for n in user.args[1:5])
        if user.args[5] or mean is None or variance is None:
            raise refused("batch norm with its statistics", "batch norm of the batch")
        # In double: the weights are rounded once.
        factor = (variance.double() + user.args[7]).rsqrt()
        if gamma is not None:
            factor = factor * gamma.double()
        shift = -mean.double() * factor
        if bias is not None:
            shift = shift + bias.double() * factor
        if beta is not None:
            shift = shift + beta.double()
        shape = [-1, *[1] * (weight.dim() - 1)]
        scaled = weight.double() * factor.reshape(shape)
        return self.take(user), scaled.float(), shift.float()


def act_of(node: Any) -> str | None:
    """What a node applies to each element, by its name in the network."""
    if node.target in RELUS:
        return "relu"
    approximate: str = node.kwargs.get("approximate", (*node.args, "none")[1])
    return {"none": "gelu", "tanh": "tanh_gelu"}.get(approximate)


def pair(sizes: Any) -> tuple[int, int]:
    """Two sizes, of two or of one for both."""
    first, second = [*sizes, *sizes][:2] if isinstance(sizes, (list, tuple)) else (sizes, sizes)
    return int(first), int(second)


def refused(rule: str, got: Any) -> ModelError:
    """Why a graph cannot be a network."""
    return ModelError(f"hotloop's own engine takes {rule}", got=got)
