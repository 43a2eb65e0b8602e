"""Copies that nobody needs: of a value that may stay as it is, or be made as it is wanted.

PyTorch gives a gradient the layout of its weight by a copy. A kernel that can write in that layout
does it at once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import operators
from .aten import EMPTY, writes
from .nodes import arguments, remove_dead

_aten: Any = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten.copy.default)
# Give their argument where values have no layout and nothing is trained.
_IDENTITIES = (
    _aten.detach.default,
    _aten.alias.default,
    _aten.contiguous.default,
    _aten.clone.default,
    _aten._assert_tensor_metadata.default,
)
_DROPOUTS = (_aten.dropout.default, _aten.feature_dropout.default)


def remove(graph: fx.GraphModule) -> None:
    """Take out copies into new memory, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target in _COPIES and node.args[0].target in EMPTY:
            _remove(node)
    remove_dead(graph.graph)
    graph.recompile()


def remove_identities(graph: fx.Graph) -> None:
    """Take out of a graph of inference what changes no value, in place."""
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        dropout = node.target in _DROPOUTS and not arguments(node)["train"]
        if dropout or node.target in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _remove(node: Any) -> None:
    target, source = node.args[:2]
    if len(target.users) != 1 or operators.memory_of(source).op == "placeholder":
        return
    # The copy may be written while others still read the source.
    memory = operators.memory_of(node)
    if any(writes(r) and operators.memory_of(r.args[0]) is memory for r in operators.readers(node)):
        return
    wanted, made = node.meta["val"], source.meta["val"]
    if wanted.dtype != made.dtype or wanted.shape != made.shape:
        return
    if not _same_memory(wanted, made) and not _make_contiguous(source, wanted):
        return
    source.meta["val"] = wanted
    node.replace_all_uses_with(source)
    # The order of the two does not matter any more; it has no users, but writes.
    node.graph.erase_node(node)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in pairs)


def _make_contiguous(source: Any, wanted: torch.Tensor) -> bool:
    """Let the kernel behind ``source`` write filters in the dense layout."""
    if source.target is not operator.getitem or len(source.users) != 1 or source.args[1] != 0:
        return False
    kernel = source.args[0]
    if kernel.target is not torch.ops.hotloop.convolve_weight_gradient.default:
        return False
    if not wanted.is_contiguous():
        return False
    kernel.args = (*kernel.args[:-1], 0)
    return True
