"""Batch norm of a train step by hotloop's kernels: with a sum and relu after it in the same pass.

For images with adjacent channels, and for rows. Statistics are those of the batch; with running
ones (frozen layers) it is ATen's.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import native
from .images import adjacent

_aten: Any = torch.ops.aten
_FORWARD = (_aten.native_batch_norm.default, _aten._native_batch_norm_legit.default)


def replace(graph: fx.GraphModule) -> None:
    """Replace batch norms, forward and backward, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        if node.target in _FORWARD:
            _forward(graph.graph, node)
        elif node.target is _aten.native_batch_norm_backward.default:
            _backward(graph.graph, node, order)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _forward(graph: fx.Graph, node: Any) -> None:
    x, weight, bias, mean, var, training, momentum, epsilon = node.args
    parts = _parts(node)
    if not training or parts is None or 0 not in parts or not adjacent(x, parts[0]):
        return
    if not _dense_vectors(weight, bias, mean, var):
        return
    addend, total = _sum_behind(parts[0], (mean, var))
    last = total or parts[0]
    relu = _only_user(last)
    if relu is not None and relu.target is _aten.relu.default and _alike(relu, last):
        last = relu
    else:
        relu = None
    # Where nothing is added, as early as it was: another one may update the same running values.
    with graph.inserting_before(last if total is not None else node):
        new = graph.call_function(
            native.batch_norm,
            (x, weight, bias, [mean, var], momentum, epsilon, addend, relu is not None),
        )
        new.meta["val"] = (last.meta["val"], *node.meta["val"][1:3])
        for number, old in {**parts, 0: last}.items():
            _take(graph, new, number, old)
    for old in (relu, total, *parts.values(), node):  # It writes, so nothing else takes it out.
        if old is not None and not old.users:
            graph.erase_node(old)


def _sum_behind(out: Any, running: tuple[Any, Any]) -> tuple[Any, Any]:
    """What is added to the result, and the sum."""
    total = _only_user(out)
    backward = _aten.native_batch_norm_backward.default
    alone = all(r is None or sum(u.target is not backward for u in r.users) == 1 for r in running)
    if total is None or total.target is not _aten.add.Tensor or total.kwargs or not alone:
        return None, None
    first, second, *_ = total.args
    other = second if first is out else first
    fits = isinstance(other, fx.Node) and other is not out and len(total.args) == 2
    return (other, total) if fits and _alike(other, out, total) else (None, None)


def _backward(graph: fx.Graph, node: Any, order: dict[Any, int]) -> None:
    g, x, weight, _, _, mean, rstd, training, _, wanted = node.args
    parts = _parts(node)
    if not training or parts is None or not parts or not adjacent(x, g):
        return
    if not _dense_vectors(weight, mean, rstd) or (0 in parts and not adjacent(parts[0])):
        return
    mask, others = None, []
    if g.target is _aten.threshold_backward.default and g.args[2] == 0 and g in order:
        others = [u for u in g.users if u is not node]
        later = all(order.get(u, -1) > order[node] for u in others)
        if later and _alike(*g.args[:2], g):
            mask = g.args[1]
    masked = mask is not None and bool(others)
    kept = [*(bool(want) and n in parts for n, want in enumerate(wanted)), masked]
    vals = [*node.meta["val"], g.meta["val"]]
    with graph.inserting_before(node):
        new = graph.call_function(
            native.batch_norm_gradient,
            (g if mask is None else g.args[0], x, mean, rstd, weight, mask, kept),
        )
        new.meta["val"] = tuple(v for v, keep in zip(vals, kept, strict=True) if keep)
        number = 0
        for old, keep in zip([*(parts.get(n) for n in range(3)), g], kept, strict=True):
            if keep:
                _take(graph, new, number, old)
                number += 1


def _take(graph: fx.Graph, new: Any, number: int, old: Any) -> None:
    """Let result ``number`` of a new node stand for ``old``."""
    part = graph.call_function(operator.getitem, (new, number))
    part.meta["val"] = new.meta["val"][number]
    old.replace_all_uses_with(part)


def _parts(node: Any) -> dict[int, Any] | None:
    """The results that are used; ``None``: the node is used as a whole."""
    parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    return parts if len(parts) == len(node.users) else None


def _only_user(node: Any) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _alike(*nodes: Any) -> bool:
    vals = [n.meta["val"] for n in nodes]
    first = vals[0]
    return all(
        (v.shape, v.stride(), v.dtype) == (first.shape, first.stride(), first.dtype) for v in vals
    )


def _dense_vectors(*nodes: Any) -> bool:
    vals = [n.meta["val"] for n in nodes if n is not None]
    return all(v.dtype == torch.float32 and v.is_contiguous() for v in vals)
