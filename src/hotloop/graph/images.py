"""Means over pixels, or the rows of a sequence, and their gradient, by hotloop's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import native
from .nodes import remove_dead

_aten: Any = torch.ops.aten
_DIVISIONS = (_aten.div.Scalar, _aten.div.Tensor)


def replace(graph: fx.GraphModule) -> None:
    """Replace means, and a gradient that is the same for each pixel, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.mean.dim:
            _mean(node)
        elif node.target is _aten.threshold_backward.default:
            _masked_gradient(graph.graph, node)
    for node in nodes:
        if node.target in _DIVISIONS and adjacent(node):
            _put(graph.graph, node, None)
    remove_dead(graph.graph)
    graph.recompile()


def _mean(node: Any) -> None:
    x, dims = node.args[:2]
    val, made = x.meta["val"], node.meta["val"]
    if node.kwargs or val.dtype != torch.float32 or not made.numel() or not dims:
        return
    taken = {d % val.dim() for d in dims}
    images = val.dim() == 4 and taken == {2, 3} and adjacent(x)
    rows = val.dim() == 3 and taken == {1} and val.is_contiguous()  # Of a sequence.
    if (images or rows) and made.flatten(1).is_contiguous():
        node.target, node.args = native.image_means, (x, val.numel() // made.numel())


def _masked_gradient(graph: fx.Graph, node: Any) -> None:
    spread, gate, threshold = node.args
    if threshold == 0 and len(spread.users) == 1 and adjacent(gate, node):
        _put(graph, node, gate)


def _put(graph: fx.Graph, last: Any, mask: Any) -> None:
    spread: Any = last if mask is None else last.args[0]
    divisor: Any = 1
    if spread.target in _DIVISIONS and not spread.kwargs:
        spread, divisor = spread.args[:2]
    if not isinstance(divisor, (int, float)) or not isinstance(spread, fx.Node):
        return
    if spread.target is not _aten.expand.default or last.meta["val"].dim() != 4:
        return
    source: Any = spread.args[0]
    val, wanted = source.meta["val"], (*last.meta["val"].shape[:2], 1, 1)
    if tuple(val.shape) != wanted or (val.stride(1) != 1 and val.shape[1] > 1):
        return
    with graph.inserting_before(last):
        new = graph.call_function(native.image_means_gradient, (source, mask, divisor))
    new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)


def adjacent(*nodes: Any) -> bool:
    """Whether all are dense float32 images with adjacent channels, or dense matrices."""
    return all(_is_adjacent(node.meta["val"]) for node in nodes)


def _is_adjacent(val: torch.Tensor) -> bool:
    if val.dtype != torch.float32 or val.numel() == 0:
        return False
    last = torch.channels_last if val.dim() == 4 else torch.contiguous_format
    return val.dim() in (2, 4) and val.is_contiguous(memory_format=last)
