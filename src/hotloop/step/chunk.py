"""Forward and backward of a chunk of a batch as a graph that any worker can run.

The gradient of a linear layer's weight is a product of two factors, ``left^T @ right`` with
``left`` ``[rows, out]`` and ``right`` ``[rows, in]``. Rows of all chunks one below the other give
the gradient of the whole batch, so chunks that hand over factors need no addition, and a weight
larger than its factors is touched once a step however many chunks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph import drawing, operators
from ..graph.aten import writes
from ..graph.from_recording import RecordedGraph
from ..graph.nodes import remove_dead
from ..graph.recording import NotRecordable
from .update_nodes import alike, weight_nodes

_aten = torch.ops.aten
# What all chunks read: none may write it.
_SHARED = ("weight", "frozen", "constant")


@dataclass(frozen=True)
class Part:
    """What a chunk hands over for one weight.

    Attributes:
        shapes: none: the weight has no gradient. One: that of the gradient. Two: of ``left`` and
            ``right``.
    """

    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def is_factored(self) -> bool:
        """Whether it is factors."""
        return len(self.shapes) == 2


@dataclass(frozen=True)
class Chunk:
    """A chunk's graph: it gives the loss, then what is handed over for each weight in turn.

    Attributes:
        tensors: what its inputs are, by kind: weights, frozen parameters, buffers, constants.
        parts: one for each weight.
        batch: layouts of the parts of the batch that it reads; batch_parts: numbers of these.
    """

    graph: fx.GraphModule
    tensors: dict[str, list[torch.Tensor]]
    parts: list[Part]
    batch: list[torch.Tensor]
    batch_parts: list[int]

    @property
    def inputs(self) -> list[tuple[str, int]]:
        """Kind and number of each input of the graph."""
        return [n.meta["input"] for n in self.graph.graph.nodes if n.op == "placeholder"]

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, from its key."""
        return any(kind == "key" for kind, _ in self.inputs)


def prepare(recorded: RecordedGraph, tensors: dict[str, list[torch.Tensor]]) -> list[Part]:
    """Make a recorded graph one of a chunk, before other passes.

    Args:
        tensors: of the model, as ``Recorder`` was given them.

    Raises:
        NotRecordable: chunks cannot run side by side, and why.
    """
    _refuse(recorded, tensors)
    foreign = drawing.replace(recorded)
    if foreign is not None:
        raise NotRecordable(f"{foreign} draws from one generator, chunks run in any order")
    return _hand_over(recorded)


def chunk_of(
    recorded: RecordedGraph, tensors: dict[str, list[torch.Tensor]], parts: list[Part]
) -> Chunk:
    """The chunk of a graph after all passes."""
    nodes: list[Any] = [n for n in recorded.graph.graph.nodes if n.op == "placeholder"]
    of_batch = [n for n in nodes if n.meta["input"][0] == "batch"]
    constants = [tensor for tensor, _ in recorded.constants]
    return Chunk(
        recorded.graph,
        {**{kind: list(found) for kind, found in tensors.items()}, "constant": constants},
        parts,
        [n.meta["val"] for n in of_batch],
        [n.meta["input"][1] for n in of_batch],
    )


def _refuse(recorded: RecordedGraph, tensors: dict[str, list[torch.Tensor]]) -> None:
    dtypes = {t.dtype for t in tensors["weight"]} - {torch.float32}
    if dtypes:
        names = ", ".join(sorted(str(d) for d in dtypes))
        raise NotRecordable(f"parameters are {names}, and workers take float32")
    loss = recorded.loss.meta["val"]
    if loss.dtype != torch.float32:
        raise NotRecordable(f"the loss is {loss.dtype}, and workers take float32")
    if not all(_is_dense(weight) for weight in tensors["weight"]):
        raise NotRecordable("a parameter is not dense in memory")
    if not all(buffer.is_contiguous() for buffer in tensors["buffer"]):
        raise NotRecordable("a buffer is not contiguous in memory")
    nodes: list[Any] = list(recorded.graph.graph.nodes)
    for node in nodes:
        for target in _written(node):
            memory = operators.memory_of(target)
            if memory.op == "placeholder" and memory.meta["input"][0] in _SHARED:
                kind = memory.meta["input"][0]
                where = f"{node.meta['line']}: " if node.meta.get("line") else ""
                raise NotRecordable(f"{where}{node.target} writes into a {kind} of all chunks")


def _written(node: Any) -> list[Any]:
    """What a node writes into."""
    if node.op != "call_function" or not writes(node):
        return []
    found: list[Any] = []
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        parts = given if isinstance(given, (list, tuple)) else (given,)
        found += [part for part in parts if isinstance(part, fx.Node)]
    return found


def _hand_over(recorded: RecordedGraph) -> list[Part]:
    """Let the graph give the loss and what it hands over, factors where they are smaller."""
    graph: Any = recorded.graph.graph
    remove_dead(graph)  # Else views that nobody reads count as users of a product.
    weights = weight_nodes(graph)
    (end,) = (n for n in graph.nodes if n.op == "output")
    results: list[Any] = [recorded.loss]
    parts = []
    with graph.inserting_before(end):
        for number, gradient in enumerate(recorded.gradients):
            if gradient is None:
                parts.append(Part())
                continue
            weight = weights[number]
            factors = _factors(recorded, gradient, weight.meta["val"])
            if factors is None:
                results.append(alike(graph, gradient, weight))
                parts.append(Part((tuple(weight.meta["val"].shape),)))
            else:
                results += factors
                parts.append(Part(tuple(tuple(f.meta["val"].shape) for f in factors)))
    end.args = (tuple(results),)
    remove_dead(graph)
    recorded.graph.recompile()
    return parts


def _factors(recorded: RecordedGraph, gradient: Any, weight: torch.Tensor) -> Sequence[Any] | None:
    """``left`` and ``right``, where they are smaller than the gradient."""
    is_plain = weight.dim() == 2 and weight.is_contiguous() and recorded.movable
    found = operators.product_behind(gradient) if is_plain else None
    if found is None:
        return None
    a, b, transposed, _ = found
    rows = a.meta["val"].shape[1]
    if rows * sum(weight.shape) >= weight.numel():
        return None
    # gradient = a @ b, or its transpose b^T @ a^T.
    left = b if transposed else _turned(recorded, a)
    right = _turned(recorded, a) if transposed else b
    return [_contiguous(recorded, factor) for factor in (left, right)]


def _turned(recorded: RecordedGraph, node: Any) -> Any:
    """The transpose; of a transpose what it is of."""
    if node.target is _aten.t.default:
        return node.args[0]
    return operators.transpose(recorded.graph, node)


def _contiguous(recorded: RecordedGraph, node: Any) -> Any:
    if node.meta["val"].is_contiguous():
        return node
    options: dict[str, Any] = {"memory_format": torch.contiguous_format}
    new = recorded.graph.graph.call_function(_aten.clone.default, (node,), options)
    new.meta["val"] = torch.empty(node.meta["val"].shape, device="meta")
    return new


def _is_dense(tensor: torch.Tensor) -> bool:
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()
