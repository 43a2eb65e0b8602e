"""The optimizer's rule as nodes of a recorded graph: limits of the gradient, then updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import operators
from ..graph.from_recording import RecordedGraph
from ..graph.nodes import remove_dead
from .updates import Update, sums_table

_aten = torch.ops.aten


def add_updates(recorded: RecordedGraph, update: Update) -> None:
    """Append the updates of all weights that have a gradient; the graph then gives the loss alone.

    Placeholders for the optimizer's state, in the order of ``Update.bind``, and for the control
    table come after the others.
    """
    graph = recorded.graph.graph
    weights = weight_nodes(graph)
    gradients = recorded.gradients
    update.used = [
        n for n, g in enumerate(gradients) if g is not None and update.has_group(update.weights[n])
    ]
    states = _add_states(recorded, update)
    with graph.inserting_before(_first_call(graph)):
        control = recorded.add_input("control", 0, update.control().to("meta"))
    (output,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        limited, scale = _limited(graph, [gradients[n] for n in update.used], update)
    with graph.inserting_before(output):
        for number, gradient in zip(update.used, limited, strict=True):
            weight, mine = weights[number], states[number]
            target = getattr(torch.ops.hotloop, f"update{len(mine)}_").default
            group = update.group_of(update.weights[number])
            laid_out = alike(graph, gradient, weight)
            graph.call_function(target, (weight, laid_out, *mine, control, scale, group))
    output.args = ((recorded.loss,),)
    remove_dead(graph)
    if recorded.movable:
        operators.fuse(recorded.graph)
    recorded.graph.recompile()


def weight_nodes(graph: fx.Graph) -> dict[int, Any]:
    """The placeholder of each weight, by its number."""
    inputs = [(n.meta["input"], n) for n in graph.nodes if n.op == "placeholder"]
    return {number: node for (kind, number), node in inputs if kind == "weight"}


def _first_call(graph: fx.Graph) -> Any:
    return next(n for n in graph.nodes if n.op != "placeholder")


def _add_states(recorded: RecordedGraph, update: Update) -> list[list[Any]]:
    graph, states = recorded.graph.graph, []
    with graph.inserting_before(_first_call(graph)):
        count = 0
        for weight in update.weights:
            mine = []
            for val in update.state_shapes(weight):
                mine.append(recorded.add_input("state", count, val))
                count += 1
            states.append(mine)
    return states


def _limited(graph: fx.Graph, gradients: list[Any], update: Update) -> tuple[list[Any], Any]:
    """Gradients cut to ``clip_value``, and what scales them to ``clip_norm``."""

    def call(target: Any, *args: Any) -> Any:
        node = graph.call_function(target, args)
        values = _values(args)
        node.meta["val"] = target(*values)
        return node

    if update.clip_value is not None:
        low, high = -update.clip_value, update.clip_value
        gradients = [call(_aten.clamp.default, g, low, high) for g in gradients]
    scale = None
    if update.clip_norm is not None and gradients:
        norms = [call(_aten.linalg_vector_norm.default, g) for g in gradients]
        total = call(_aten.linalg_vector_norm.default, call(_aten.stack.default, norms))
        inverse = call(_aten.reciprocal.default, call(_aten.add.Scalar, total, 1e-6))
        scale = call(
            _aten.clamp.default, call(_aten.mul.Scalar, inverse, update.clip_norm), None, 1.0
        )
    return gradients, scale


def _values(tree: Any) -> Any:
    if isinstance(tree, fx.Node):
        return tree.meta["val"]
    if isinstance(tree, (list, tuple)):
        return [_values(part) for part in tree]
    return tree


def alike(graph: fx.Graph, gradient: Any, weight: Any) -> Any:
    """The gradient laid out as its weight."""
    val = weight.meta["val"]
    if gradient.meta["val"].stride() == val.stride():
        return gradient
    empty = graph.call_function(
        _aten.new_empty_strided.default, (gradient, list(val.shape), list(val.stride()))
    )
    copied = graph.call_function(_aten.copy_.default, (empty, gradient))
    for node in (empty, copied):
        node.meta["val"] = val
    return copied


def add_sums(recorded: RecordedGraph) -> None:
    """Add each gradient to a sum: the update of SGD at a rate of -1 (``updates.sums_table``).

    The graph then gives the loss alone; a gradient that is a product never exists as a whole.
    """
    graph = recorded.graph.graph
    weights = weight_nodes(graph)
    sums = []
    with graph.inserting_before(_first_call(graph)):
        for number, gradient in enumerate(recorded.gradients):
            # A weight without gradient has its sum too, so that numbers stay those of the weights.
            val = None if gradient is None else torch.empty_like(weights[number].meta["val"])
            sums.append(recorded.add_input("state", number, val))
        control = recorded.add_input("control", 0, sums_table().to("meta"))
    (output,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        for total, gradient in zip(sums, recorded.gradients, strict=True):
            if gradient is None:
                continue
            if gradient.meta["val"].dtype != torch.float32:
                node = graph.call_function(_aten.add_.Tensor, (total, gradient))
                node.meta["val"] = total.meta["val"]
                continue
            target = torch.ops.hotloop.update0_.default
            laid_out = alike(graph, gradient, total)
            graph.call_function(target, (total, laid_out, control, None, 0))
    output.args = ((recorded.loss,),)
    remove_dead(graph)
    if recorded.movable:
        operators.fuse(recorded.graph)
    recorded.graph.recompile()
