"""A graph as plain values that another process can be sent, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map, tree_map_only


class NodeName(NamedTuple):
    """Stands for the result of the node of that name."""

    name: str


class _Layout(NamedTuple):
    """Of a value without memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Operator(NamedTuple):
    """An operator of torch's by its name."""

    name: str


Row = tuple[str, str, Any, Any, Any, dict[str, Any]]


def to_rows(graph: fx.GraphModule) -> list[Row]:
    """A row for each node, in order."""
    rows = []
    for node in graph.graph.nodes:
        target: Any = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = _Operator(str(target))
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: NodeName(n.name))
        meta = {n: node.meta[n] for n in ("val", "input", "aliases") if n in node.meta}
        meta = tree_map_only(torch.Tensor, _layout, meta)
        rows.append((node.op, node.name, target, _plain(args), _plain(kwargs), meta))
    return rows


def from_rows(rows: list[Row]) -> fx.GraphModule:
    """The graph again."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, meta in rows:
        if isinstance(target, _Operator):
            target = _operator(target.name)
        of_args, of_kwargs = _replaced((args, kwargs), NodeName, lambda n: made[n.name])
        made[name] = graph.create_node(op, target, of_args, of_kwargs, name)
        made[name].meta.update(_replaced(meta, _Layout, _empty))
    return fx.GraphModule({}, graph)


def _plain(tree: Any) -> Any:
    """fx keeps lists and dicts of its own."""
    if isinstance(tree, NodeName):
        return tree
    if isinstance(tree, dict):
        return {name: _plain(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_plain(part) for part in tree]
    return tuple(_plain(part) for part in tree) if type(tree) is tuple else tree


def _replaced(tree: Any, kind: Any, change: Any) -> Any:
    return tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, kind),
    )


def _layout(tensor: torch.Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _empty(layout: _Layout) -> torch.Tensor:
    return torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device="meta")


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found
