"""A loss and its gradient in one pass, where the loss is what the step starts its backward from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import native
from .nodes import parts, remove_dead, take_parts

_aten: Any = torch.ops.aten
_MEAN, _SUM = 1, 2


def fuse(graph: fx.GraphModule) -> None:
    """Replace cross entropy and mean squared error, forward and backward, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.nll_loss_forward.default:
            _cross_entropy(graph.graph, node)
        elif node.target is _aten.mse_loss.default:
            _squared_error(graph.graph, node)
    remove_dead(graph.graph)
    graph.recompile()


def _cross_entropy(graph: fx.Graph, forward: Any) -> None:
    logs, labels, weights, reduction, ignore = forward.args
    loss, total = map(parts(forward).get, range(2))
    if logs.target is not _aten._log_softmax.default or loss is None or reduction == 0:
        return
    backwards = [n for n in logs.users if n.target is _aten.nll_loss_backward.default]
    if len(backwards) != 1 or not _rows_of_floats(logs.args[0]) or logs.args[1] not in (1, -1):
        return
    (backward,) = backwards
    ends = list(backward.users)
    if len(ends) != 1 or ends[0].target is not _aten._log_softmax_backward_data.default:
        return
    scale = _seed(backward.args[0], loss)
    alone = set(logs.users) == {forward, backward, ends[0]}
    if scale is None or not alone or (total is not None and set(total.users) != {backward}):
        return
    y = labels.meta["val"]
    if y.dtype != torch.int64 or not y.is_contiguous() or y.dim() != 1:
        return
    args = (logs.args[0], labels, weights, reduction == _MEAN, ignore, scale)
    _put(graph, forward, native.cross_entropy, args, loss, ends[0])


def _squared_error(graph: fx.Graph, forward: Any) -> None:
    output, target = forward.args[:2]
    reduction = forward.args[2] if len(forward.args) > 2 else _MEAN
    backwards = [n for n in output.users if n.target is _aten.mse_loss_backward.default]
    if len(backwards) != 1 or reduction == 0 or backwards[0].args[1:3] != (output, target):
        return
    scale = _seed(backwards[0].args[0], forward)
    dense = all(_is_dense_float(n) for n in (output, target, backwards[0]))
    if scale is None or not dense or output.meta["val"].shape != target.meta["val"].shape:
        return
    args = (output, target, reduction == _MEAN, scale)
    _put(graph, forward, native.squared_error, args, forward, backwards[0])


def _put(graph: fx.Graph, forward: Any, kernel: Any, args: Any, loss: Any, gradient: Any) -> None:
    with graph.inserting_after(forward):
        new = graph.call_function(kernel, args)
    new.meta["val"] = (loss.meta["val"], gradient.meta["val"])
    with graph.inserting_after(new):
        take_parts(new, {0: loss, 1: gradient})


def _seed(node: Any, loss: Any) -> float | None:
    """What the gradient of the loss is, where that is known: 1, or a number times 1."""
    factor = 1.0
    while node.target is _aten.mul.Tensor and isinstance(node.args[1], float):
        factor *= node.args[1]
        node = node.args[0]
    return factor if node.target is _aten.ones_like.default else None


def _rows_of_floats(node: Any) -> bool:
    val = node.meta["val"]
    return bool(val.dtype == torch.float32 and val.dim() == 2 and val.stride(1) == 1)


def _is_dense_float(node: Any) -> bool:
    val = node.meta["val"]
    return bool(val.dtype == torch.float32 and val.is_contiguous())
