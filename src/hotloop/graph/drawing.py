"""Random numbers of a graph as functions of a key: the same whoever draws them, and when.

One generator cannot serve parts of a batch that run in any order. So what a graph draws from
torch's generator (dropout, noise) is drawn from a hash (``data.hashing``) of a key, the number of
the operation in the graph, and the position in its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import native, operators
from .aten import writes
from .from_recording import RecordedGraph
from .nodes import remove_dead

_aten: Any = torch.ops.aten
# Kind of draw and its two numbers (``kernels.calls.random``), or the tensor that draws are held
# against: 1 where they are below.
_Draw = tuple[str, float, float] | fx.Node


def replace(recorded: RecordedGraph) -> str | None:
    """Let every draw depend on a key, an input of kind ``"key"``, in place.

    Returns:
        An operation that draws from a generator even so; ``None``: none does.
    """
    graph = recorded.graph.graph
    drawing = [n for n in graph.nodes if torch.Tag.nondeterministic_seeded in _tags(n)]
    if not drawing:
        return None
    for node in drawing:
        if _draw_of(node) is None:
            return str(node.target)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        key = recorded.add_input("key", 0, torch.empty(1, dtype=torch.int64, device="meta"))
    for number, node in enumerate(drawing, 1):
        _replace(graph, node, key, number)
    remove_dead(graph)
    recorded.graph.recompile()
    return None


def _tags(node: Any) -> Any:
    return getattr(node.target, "tags", ())


def _draw_of(node: Any) -> _Draw | None:
    """What a node draws; ``None``: nothing that a kernel can."""
    rule = _RULES.get(node.target)
    val = node.meta.get("val")
    if rule is None or node.kwargs.get("generator") is not None:
        return None
    if not isinstance(val, torch.Tensor) or val.dtype.is_complex:
        return None
    return rule(*node.args, **{n: v for n, v in node.kwargs.items() if n in _NUMBERS})


def _replace(graph: fx.Graph, node: Any, key: Any, number: int) -> None:
    wanted = node.meta["val"]
    draw = _draw_of(node)
    below = draw if isinstance(draw, fx.Node) else None
    kind, a, b = ("uniform", 0.0, 1.0) if below is not None else draw  # type: ignore[misc]

    # What has gaps is a part of something that it is copied into.
    like = wanted if _is_dense(wanted) else torch.empty(wanted.shape, device="meta")

    def add(target: Any, args: Any, made_dtype: torch.dtype, **options: Any) -> Any:
        new = graph.call_function(target, args, options)
        new.meta["val"] = torch.empty_strided(
            like.shape, like.stride(), dtype=made_dtype, device="meta"
        )
        return new

    with graph.inserting_before(node):
        made = add(native.random, (key, number, kind, float(a), float(b)), torch.float32)
        if below is not None:
            made = add(_aten.lt.Tensor, (made, below), torch.bool)
        if made.meta["val"].dtype != wanted.dtype:
            made = add(_aten._to_copy.default, (made,), wanted.dtype, dtype=wanted.dtype)
        if writes(node) and not _is_own(node.args[0]):
            made = add(_aten.copy_.default, (node.args[0], made), wanted.dtype)
            made.meta["val"] = wanted
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _is_own(target: Any) -> bool:
    """Whether nothing else reads the memory that an operation fills."""
    is_whole = target.op == "call_function" and operators.memory_of(target) is target
    return is_whole and len(target.users) == 1


def _is_dense(val: torch.Tensor) -> bool:
    """Whether its elements fill memory without gaps."""
    reach = 1 + sum((n - 1) * s for n, s in zip(val.shape, val.stride(), strict=True))
    return val.numel() == 0 or reach == val.numel()


def _below(_: Any, p: Any = 0.5) -> _Draw | None:
    return p if isinstance(p, fx.Node) else ("below", p, 0.0)


# What a rule may be told by name.
_NUMBERS = ("p", "from", "to", "mean", "std")


def _uniform(_: Any, low: float = 0.0, high: float = 1.0, **named: float) -> _Draw:
    return "uniform", named.get("from", low), named.get("to", high)


def _normal(_: Any, mean: float = 0.0, std: float = 1.0) -> _Draw:
    return "normal", mean, std


def _even(*_: Any) -> _Draw:
    return "uniform", 0.0, 1.0


def _standard(*_: Any) -> _Draw:
    return "normal", 0.0, 1.0


_RULES: dict[Any, Callable[..., _Draw | None]] = {
    _aten.bernoulli_.float: _below,
    _aten.bernoulli_.Tensor: _below,
    _aten.bernoulli.p: _below,
    _aten.bernoulli.default: lambda p: p,
    _aten.uniform_.default: _uniform,
    _aten.normal_.default: _normal,
    _aten.rand.default: _even,
    _aten.randn.default: _standard,
    _aten.rand_like.default: _even,
    _aten.randn_like.default: _standard,
}
