"""Copies between layouts, concatenations and counters as calls of hotloop's kernels.

Each does what ATen's operation does, bit for bit; but it needs no interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import native
from .aten import EMPTY
from .elementwise import is_element_wise
from .nodes import remove_dead
from .operators import memory_of
from .product_sums import is_inner_sum, is_sum, summands

_aten: Any = torch.ops.aten
_MOST_DIMS = 8  # As in the kernel.
_COPIES = (_aten.copy_.default, _aten.copy.default)
_DTYPES = (torch.float32, torch.int64, torch.float64, torch.int32, torch.bool, torch.uint8)


def replace(graph: fx.GraphModule) -> None:
    """Replace them, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.clone.default and _may_stay(node):
            node.replace_all_uses_with(node.args[0])
            continue
        found = _RULES.get(node.target) if node.op == "call_function" else None
        made = None if found is None else found(node)
        if made is None:
            continue
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(*made)
        new.meta |= {name: node.meta[name] for name in ("val", "line") if name in node.meta}
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):
        _stack_of_placed(graph.graph, node)
    remove_dead(graph.graph)
    graph.recompile()


def _may_stay(node: Any) -> bool:
    """Whether a copy is not needed: nothing writes into values, and its readers take any layout."""
    source, val = node.args[0], node.meta["val"]
    if memory_of(source).op == "placeholder":
        return False
    same = source.meta["val"].stride() == val.stride()
    return bool(same or all(is_element_wise(user) for user in node.users))


def _stack_of_placed(graph: fx.Graph, node: Any) -> None:
    """A sum of values, each in a place of its own, is all of them one after the other."""
    if not is_sum(node) or is_inner_sum(node):
        return
    leaves = summands(node)
    if any(leaf.target is not native.placed or len(leaf.users) > 1 for leaf in leaves):
        return
    shape, (dim, *others) = node.meta["val"].shape, [leaf.args[1] for leaf in leaves]
    stacked = all(leaf.args[0].meta["val"].dim() == len(shape) - 1 for leaf in leaves)
    numbers = sorted(leaf.args[2] for leaf in leaves)
    if not stacked or any(d != dim for d in others) or numbers != list(range(shape[dim])):
        return
    parts = [leaf.args[0] for leaf in sorted(leaves, key=lambda leaf: leaf.args[2])]
    with graph.inserting_before(node):
        new = graph.call_function(native.concatenate, (parts, dim, True))
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)


def _copies(*nodes: Any) -> bool:
    """Whether the kernel copies these, which have one dtype."""
    vals = [n.meta["val"] for n in nodes]
    dtypes = {v.dtype for v in vals}
    fits = all(v.dim() <= _MOST_DIMS and not v.is_conj() and not v.is_neg() for v in vals)
    return fits and len(dtypes) == 1 and dtypes <= set(_DTYPES) and vals[-1].numel() > 0


def _clone(node: Any) -> Any:
    return (native.copy, (node.args[0],)) if _copies(node.args[0], node) else None


def _copy(node: Any) -> Any:
    target, source = node.args[:2]
    fresh = target.target in EMPTY and len(target.users) == 1
    same = source.meta["val"].shape == node.meta["val"].shape
    if not same or not _copies(source, node):
        return None
    return (native.copy, (source,)) if fresh or node.target is _aten.copy.default else None


def _cat(node: Any) -> Any:
    parts, *dims = node.args
    dim = dims[0] if dims else 0
    # Such an empty one counts for nothing, whatever its shape.
    parts = [p for p in parts if list(p.meta["val"].shape) != [0]]
    if not parts or node.kwargs or not _copies(*parts, node):
        return None
    return native.concatenate, (parts, dim % node.meta["val"].dim(), False)


def _stack(node: Any) -> Any:
    parts, *dims = node.args
    if not parts or node.kwargs or not _copies(*parts, node):
        return None
    return native.concatenate, (parts, (dims[0] if dims else 0) % node.meta["val"].dim(), True)


def _placed(node: Any) -> Any:
    x, sizes, dim, begin, _, step = node.args
    if step != 1 or not _copies(x, node):
        return None
    dim = dim % len(sizes)
    begin = max(0, begin + sizes[dim]) if begin < 0 else min(begin, sizes[dim])
    return native.placed, (x, dim, begin)


def _selected(node: Any) -> Any:
    x, sizes, dim, index = node.args
    if not _copies(x, node):
        return None
    return native.placed, (x, dim % len(sizes), index % sizes[dim])


def _add_count(node: Any) -> Any:
    count, addend, *_ = node.args
    val = count.meta["val"]
    whole = isinstance(addend, int) and not node.kwargs and len(node.args) == 2
    if not whole or val.dtype != torch.int64 or val.numel() != 1 or node.users:
        return None
    return native.add_count, (count, addend)


_RULES = {
    _aten.clone.default: _clone,
    _aten.copy_.default: _copy,
    _aten.copy.default: _copy,
    _aten.cat.default: _cat,
    _aten.stack.default: _stack,
    _aten.slice_backward.default: _placed,
    _aten.select_backward.default: _selected,
    _aten.add_.Tensor: _add_count,
}
