"""Batch norm of a train step by hotloop's kernels: with a sum and relu after it in the same pass.

For images with adjacent channels, and for rows. Statistics are those of the batch; with running
ones (frozen layers) it is ATen's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import native
from .epilogues import Epilogue, epilogue_of
from .images import adjacent
from .nodes import parts, remove_dead, take_parts

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
    remove_dead(graph.graph)
    graph.recompile()


def _forward(graph: fx.Graph, node: Any) -> None:
    x, weight, bias, mean, var, training, momentum, epsilon = node.args
    read = parts(node)
    later = [user for user in node.users if user.target is native.version]
    known = len(read) + len(later) == len(node.users) and 0 in read
    if not training or not known or not adjacent(x, read[0]):
        return
    if not _dense_vectors(weight, bias, mean, var):
        return
    # Who reads the running values, before it and after; its own backward does not need them.
    running = [r for r in (mean, var, *later) if r is not None]
    others = (_aten.native_batch_norm_backward.default, native.version)
    readers = {user for r in running for user in r.users if user.target not in others}
    alone = readers <= {node}
    found = epilogue_of(read[0], fits_addend=(lambda *both: _alike(*both)) if alone else None)
    if not _alike(read[0], found.last):
        found = Epilogue(read[0])
    # Where nothing is added, as early as it was: another one may update the same running values.
    with graph.inserting_before(node if found.addend is None else found.last):
        relu = found.activation == "relu"
        new = graph.call_function(
            native.batch_norm,
            (x, weight, bias, [mean, var], momentum, epsilon, found.addend, relu),
        )
        new.meta["val"] = (found.last.meta["val"], *node.meta["val"][1:3])
        take_parts(new, {**read, 0: found.last})
    for value in later:
        value.replace_input_with(node, new)
    # It writes, so nothing else takes it out.
    for old in (*reversed(found.taken), *read.values(), node):
        if not old.users:
            graph.erase_node(old)


def _backward(graph: fx.Graph, node: Any, order: dict[Any, int]) -> None:
    g, x, weight, _, _, mean, rstd, training, _, wanted = node.args
    read = parts(node)
    if not training or not read or len(read) != len(node.users) or not adjacent(x, g):
        return
    if not _dense_vectors(weight, mean, rstd) or (0 in read and not adjacent(read[0])):
        return
    mask, others = None, []
    if g.target is _aten.threshold_backward.default and g.args[2] == 0 and g in order:
        others = [u for u in g.users if u is not node]
        later = all(order.get(u, -1) > order[node] for u in others)
        if later and _alike(*g.args[:2], g):
            mask = g.args[1]
    masked = mask is not None and bool(others)
    kept = [*(bool(want) and n in read for n, want in enumerate(wanted)), masked]
    vals = [*node.meta["val"], g.meta["val"]]
    with graph.inserting_before(node):
        new = graph.call_function(
            native.batch_norm_gradient,
            (g if mask is None else g.args[0], x, mean, rstd, weight, mask, kept),
        )
        new.meta["val"] = tuple(v for v, keep in zip(vals, kept, strict=True) if keep)
        olds = zip([*map(read.get, range(3)), g], kept, strict=True)
        take_parts(new, dict(enumerate(old for old, keep in olds if keep)))


def _alike(*nodes: Any) -> bool:
    vals = [n.meta["val"] for n in nodes]
    first = vals[0]
    return all(
        (v.shape, v.stride(), v.dtype) == (first.shape, first.stride(), first.dtype) for v in vals
    )


def _dense_vectors(*nodes: Any) -> bool:
    vals = [n.meta["val"] for n in nodes if n is not None]
    return all(v.dtype == torch.float32 and v.is_contiguous() for v in vals)
