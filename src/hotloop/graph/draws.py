"""Dropout's masks, drawn by a kernel as torch would have drawn them.

torch draws them one by one, which took a third of a transformer's step. The kernel works with the
state of torch's own generator, and what it draws is bit for bit the same. Whether it is with this
torch is tried out before; one that draws in another way does so itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from ..kernels import calls
from . import native
from .aten import EMPTY
from .nodes import only_reader, remove_dead
from .recording import extent_bytes

_aten: Any = torch.ops.aten
_DIVISIONS = (_aten.div.Scalar, _aten.div.Tensor)


def fuse(graph: fx.GraphModule) -> None:
    """Replace draws, each with the division behind it, in place."""
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.bernoulli_.float and _is_fresh(node) and draws_as_torch():
            _fuse(graph.graph, node)
    remove_dead(graph.graph)
    graph.recompile()


def _is_fresh(node: Any) -> bool:
    memory, val = node.args[0], node.meta["val"]
    plain = not any(v is not None for v in node.kwargs.values())
    dense = val.dtype == torch.float32 and extent_bytes(val) == val.numel() * val.element_size()
    return bool(plain and dense and memory.target in EMPTY and len(memory.users) == 1)


def _fuse(graph: fx.Graph, node: Any) -> None:
    probability = float(node.args[1]) if len(node.args) > 1 else 0.5
    value, last = 1.0, node
    user = only_reader(node)
    divides = user is not None and user.target in _DIVISIONS and not user.kwargs
    if divides and user.args[0] is node and isinstance(user.args[1], (int, float)):
        # As torch rounds it.
        value, last = float(torch.ones(64).div_(user.args[1])[0]), user
    # Where it was drawn: another one may follow before the division.
    with graph.inserting_before(node):
        new = graph.call_function(native.draw, (probability, value))
    new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)
    for old in (last, node):  # It writes, so nothing else takes it out.
        if old in graph.nodes and not old.users:
            graph.erase_node(old)


@functools.cache
def draws_as_torch() -> bool:
    """Whether the kernel draws what this torch draws, and leaves the same state."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1,), (700,), (3, 1000), (2, 16, 5, 7)]
    for probability in (0.9, 0.5, 0.123):
        for shape in shapes:
            # Half of a number is left over now and then.
            torch.empty(1).uniform_(generator=generator)
            wanted = torch.empty(shape)
            if len(shape) == 4:
                wanted = wanted.to(memory_format=torch.channels_last)
            found, state = torch.empty_like(wanted), generator.get_state()
            calls.draw(found, state, probability)()
            wanted.bernoulli_(probability, generator=generator)
            after = generator.get_state()
            if not (torch.equal(found, wanted) and torch.equal(state, after)):
                return False
    return True
