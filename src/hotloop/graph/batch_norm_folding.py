"""Batch norm in eval mode goes into the weights of the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .nodes import arguments, only_reader

_aten: Any = torch.ops.aten


def fold(graph: fx.Graph, constants: dict[fx.Node, torch.Tensor]) -> None:
    """Replace each batch norm that is all a layer's result is read by, in place.

    Args:
        graph: of inference, from ``torch.export``.
        constants: the tensor of each placeholder that stands for a weight or buffer. Placeholders
            of the new weights are added.
    """
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.target not in (_aten.linear.default, _aten.conv2d.default):
            continue
        norm = only_reader(node)
        if norm is None or norm.target is not _aten.batch_norm.default or norm.args[0] is not node:
            continue
        # After a linear layer over rows, batch norm takes each row for a channel.
        if node.target is _aten.linear.default and node.meta["val"].dim() != 2:
            continue
        _, weight, bias, *rest = arguments(node).values()
        _, gamma, beta, mean, variance, training, _, epsilon, _ = arguments(norm).values()
        read = [n for n in (weight, bias, gamma, beta, mean, variance) if n is not None]
        if training or mean is None or variance is None or not all(n in constants for n in read):
            continue
        tensors = [n and constants[n] for n in (weight, bias, gamma, beta, mean, variance)]
        made = _folded(*tensors, epsilon=epsilon)
        with graph.inserting_before(weight):
            new = [graph.placeholder(f"{node.name}_{part}") for part in ("weight", "bias")]
        for placeholder, tensor in zip(new, made, strict=True):
            placeholder.meta["val"] = constants[placeholder] = tensor
        node.args, node.kwargs = (node.args[0], *new, *rest), {}
        norm.replace_all_uses_with(node)
        graph.erase_node(norm)


def _folded(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the layer and its norm together, computed in double and rounded once."""
    factor = (variance.double() + epsilon).rsqrt()
    if gamma is not None:
        factor = factor * gamma.double()
    shift = -mean.double() * factor
    if bias is not None:
        shift = shift + bias.double() * factor
    if beta is not None:
        shift = shift + beta.double()
    scaled = weight.double() * factor.reshape([-1, *[1] * (weight.dim() - 1)])
    return scaled.float(), shift.float()
