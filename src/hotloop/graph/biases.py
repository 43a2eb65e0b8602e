"""A bias that is added to a product in another shape: the product adds it itself.

``torch.nn.functional.linear`` on a batch of sequences that do not lie dense makes the product first
and adds the bias to a view of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .nodes import remove_dead

_aten: Any = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)


def fuse(graph: fx.GraphModule) -> None:
    """Replace ``view(a @ b) + bias``, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            _fuse(graph.graph, node)
    remove_dead(graph.graph)
    graph.recompile()


def _fuse(graph: fx.Graph, node: Any) -> None:
    view, bias = node.args
    if not all(isinstance(n, fx.Node) and n.op != "output" for n in (view, bias)):
        return
    product = view.args[0] if view.target in _VIEWS else None
    if product is None or product.target is not _aten.mm.default:
        return
    shape, made = bias.meta["val"].shape, product.meta["val"]
    alike = len(shape) == 1 and shape[0] == made.shape[1] == view.meta["val"].shape[-1]
    alone = len(view.users) == 1 and len(product.users) == 1
    layout = node.meta["val"].stride() == view.meta["val"].stride()
    if not (alike and alone and layout) or bias.op != "placeholder":
        return
    with graph.inserting_before(product):
        new = graph.call_function(_aten.addmm.default, (bias, *product.args))
    new.meta.update(product.meta)
    product.replace_all_uses_with(new)
    node.replace_all_uses_with(view)
