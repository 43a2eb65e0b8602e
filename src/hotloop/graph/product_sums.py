"""Sums of products as one product: the gradient of a weight that a step uses several times.

A recurrent net multiplies by its weight once for each row of the sequence, and adds as many
gradients. Their factors one after the other are the factors of one product, whose sums are those:
``a1 @ b1 + a2 @ b2 = [a1 a2] @ [b1; b2]``. So it is with the sums of columns for a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .from_recording import RecordedGraph
from .nodes import only_reader, remove_dead

_aten: Any = torch.ops.aten
_ADD = (_aten.add.Tensor,)
_TURNS = (_aten.t.default,)
_VIEWS = (_aten.view.default, _aten.reshape.default)


def merge(recorded: RecordedGraph) -> None:
    """Replace such sums, in place; gradients of the graph are then the new ones."""
    _Merger(recorded.graph.graph).merge()
    (output,) = (n for n in recorded.graph.graph.nodes if n.op == "output")
    given = iter(output.args[0][1:])
    recorded.gradients = [None if g is None else next(given) for g in recorded.gradients]
    remove_dead(recorded.graph.graph)
    recorded.graph.recompile()


class _Merger:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._order: dict[Any, int] = {node: number for number, node in enumerate(graph.nodes)}
        # Parts, and the dimension along which they follow one another -> that tensor.
        self._joined: dict[Any, Any] = {}

    def merge(self) -> None:
        sums = [n for n in self._order if is_sum(n) and not is_inner_sum(n)]
        for kind in (_aten.mm.default, _aten.sum.dim_IntList):  # The latter use what those joined.
            for node in sums:
                self._merge(node, kind)

    def _merge(self, node: Any, kind: Any) -> None:
        leaves = summands(node)
        sources = [s for s in map(_source, leaves) if s is not None and s[0].target is kind]
        if len(sources) < len(leaves) or len({way for _, way in sources}) != 1:
            return
        made, way = [source for source, _ in sources], sources[0][1]
        find = self._product if kind is _aten.mm.default else self._column_sums
        factors = find(made, node)
        if factors is None:
            return
        with self.graph.inserting_before(node):
            new = self._call(kind, *factors)
            for view in way:
                shape = () if view in _TURNS else (list(node.meta["val"].shape),)
                new = self._call(view, new, *shape)
        if _layout(new) != _layout(node):
            return
        node.replace_all_uses_with(new)

    def _product(self, products: list[Any], node: Any) -> tuple[Any, ...] | None:
        factors = [[p.args[n] for p in products] for n in range(2)]
        # What is copied must be less than what the sums would read and write.
        copied = 2 * sum(f.meta["val"].numel() for group in factors for f in group)
        if copied > 3 * (len(products) - 1) * node.meta["val"].numel():
            return None
        return self._join(factors[0], 1), self._join(factors[1], 0)

    def _column_sums(self, sums: list[Any], node: Any) -> tuple[Any, ...] | None:
        whole = self._joined.get((0, *(s.args[0] for s in sums)))
        # Copied for this alone, they would cost more.
        return None if whole is None else (whole, [0], True)

    def _join(self, parts: list[Any], dim: int) -> Any:
        """The parts one after the other; transposes of them, as the transpose of that."""
        if all(p.target in _TURNS for p in parts):
            whole = self._join([p.args[0] for p in parts], 1 - dim)
            with self.graph.inserting_after(whole):
                return self._call(_aten.t.default, whole)
        if (dim, *parts) not in self._joined:
            with self.graph.inserting_after(max(parts, key=lambda p: self._order[p])):
                self._joined[dim, *parts] = self._call(_aten.cat.default, list(parts), dim)
        return self._joined[dim, *parts]

    def _call(self, target: Any, *args: Any) -> Any:
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*_vals(args))
        return node


def _layout(node: Any) -> Any:
    val = node.meta["val"]
    return val.shape, val.stride(), val.dtype


def is_inner_sum(node: Any) -> bool:
    """Whether a sum is only a part of another one."""
    reader = only_reader(node)
    return reader is not None and is_sum(reader)


def is_sum(node: Any) -> bool:
    """Whether it is a sum of two tensors of its own shape, and no more."""
    if node.target not in _ADD or node.kwargs or len(node.args) != 2:
        return False
    val = node.meta["val"]
    shape = val.shape if val.dtype == torch.float32 else None
    return all(isinstance(a, fx.Node) and a.meta["val"].shape == shape for a in node.args)


def summands(node: Any) -> list[Any]:
    """What is added up, in order."""
    found: list[Any] = []
    left = [node]
    while left:
        now = left.pop()
        if now is node or (is_sum(now) and len(now.users) == 1):
            left += reversed(now.args)
        else:
            found.append(now)
    return found


def _source(leaf: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The product or the sum of columns behind a leaf, and the views on the way from it."""
    way: list[Any] = []
    node = leaf
    while node.op == "call_function" and len(node.users) == 1:
        if sum(view in _VIEWS for view in way) > 1:
            return None
        if node.target is _aten.mm.default:
            return node, tuple(way)
        if node.target is _aten.sum.dim_IntList:
            x, dims, *rest = node.args
            plain = x.meta["val"].dim() == 2 and list(dims) == [0] and rest == [True]
            return (node, tuple(way)) if plain and not node.kwargs else None
        if node.target not in (*_TURNS, *_VIEWS):
            return None
        way.insert(0, node.target)
        node = node.args[0]
    return None


def _vals(tree: Any) -> Any:
    if isinstance(tree, fx.Node):
        return tree.meta["val"]
    return [_vals(part) for part in tree] if isinstance(tree, (list, tuple)) else tree
