"""Max pooling in a graph: relu, pooling and both their backwards as two kernels.

torch keeps 64-bit indices and reads the large tensor three times; hotloop keeps one byte for each
result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .epilogues import pool_window
from .nodes import add_parts, parts, remove_dead

_aten = torch.ops.aten


def fuse(graph: fx.GraphModule) -> None:
    """Replace each max pooling whose windows lie next to each other, and the relu before it."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.max_pool2d_with_indices.default:
            _fuse(graph, node)
    remove_dead(graph.graph)
    graph.recompile()


def _fuse(graph: fx.GraphModule, node: Any) -> None:
    window = pool_window(node)
    x = node.args[0]
    value = x.meta["val"]
    if window is None or math.prod(window) >= 255:  # A place in a window is one byte.
        return
    if value.dtype != torch.float32 or value.dim() != 4:
        return
    given = parts(node)
    if len(given) != len(node.users) or 0 not in given:
        return
    backwards = list(given[1].users) if 1 in given else []
    if any(b.target is not _aten.max_pool2d_with_indices_backward.default for b in backwards):
        return
    relu = x if x.target is _aten.relu.default else None
    masks: dict[Any, Any] = {}
    if relu is not None:
        # Only where nothing else needs what lies between: pooling, and relu's own backward.
        for user in relu.users:
            if user.target is _aten.threshold_backward.default and user.args[1] is relu:
                masks[user.args[0]] = user
            elif user is not node and user not in backwards:
                relu = None
                break
    if relu is not None and not all(b in masks and len(b.users) == 1 for b in backwards):
        relu = None
    call, (kh, kw) = graph.graph.call_function, window
    with graph.graph.inserting_before(node):
        start = x if relu is None else relu.args[0]
        # The results' layout is what the nodes after them were traced with.
        last = given[0].meta["val"].stride(1) == 1
        # But a copy to the dense layout, as before a flatten, is written at once.
        copies = [u for u in given[0].users if _is_dense_copy(u)]
        last = last and not (copies and len(copies) == len(given[0].users))
        options = (kh, kw, int(relu is not None), int(last))
        new = call(torch.ops.hotloop.pool.default, (start, *options))
        new.meta["val"] = torch.ops.hotloop.pool.default(start.meta["val"], *options)
        results = add_parts(new, 2)
    for copied in [] if last else copies:
        copied.replace_all_uses_with(results[0])
    given[0].replace_all_uses_with(results[0])
    height, width = value.shape[2:]
    for backward in backwards:
        end = masks[backward] if relu is not None else backward
        with graph.graph.inserting_before(end):
            mine = call(
                torch.ops.hotloop.pool_backward.default,
                (backward.args[0], results[1], height, width, kh, kw),
            )
            mine.meta["val"] = end.meta["val"]
        end.replace_all_uses_with(mine)


def _is_dense_copy(node: Any) -> bool:
    dense = node.kwargs.get("memory_format") is torch.contiguous_format
    return node.target is _aten.clone.default and dense
