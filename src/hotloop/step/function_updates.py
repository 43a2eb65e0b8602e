"""The updates of a recorded function: several optimizers, each with any number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..graph import native, operators
from ..graph.from_recording import RecordedGraph
from ..graph.nodes import remove_dead
from ..graph.recording import Marker, NotRecordable, Recording
from .update_nodes import alike
from .updates import Update


def markers_of(recording: Recording) -> list[Marker]:
    """The steps of optimizers and schedulers, in order."""
    return [entry.op for entry in recording.entries if isinstance(entry.op, Marker)]


def updates_of(
    recorded: RecordedGraph,
    optimizers: Sequence[torch.optim.Optimizer],
    live: Sequence[torch.Tensor],
) -> dict[int, Update]:
    """The rule of each optimizer that makes a step, by its number.

    Raises:
        NotRecordable: an optimizer has other weights with gradients in one of its steps than in
            another one.
    """
    found: dict[int, Update] = {}
    for mark in _marks(recorded):
        number, nodes, _ = mark.args
        weights = [live[_placeholder(node).meta["input"][1]] for node in nodes]
        known = found.get(number)
        if known is None:
            every = list(range(len(weights)))
            found[number] = Update(optimizers[number], weights, used=every)
        elif [id(w) for w in known.weights] != [id(w) for w in weights]:
            raise NotRecordable("an optimizer updates other weights in one of its steps")
    return found


def add_function_updates(recorded: RecordedGraph, updates: dict[int, Update]) -> None:
    """Put the updates of all weights where the optimizers make their steps.

    Placeholders for the optimizers' state, in the order of ``updates`` and ``Update.bind``, and for
    the control table are added. Each step has rows of its own in the table, in order.
    """
    graph = recorded.graph.graph
    marks = _marks(recorded)
    if not marks:
        return
    states: dict[int, list[list[Any]]] = {}
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        count = 0
        for number, update in updates.items():
            states[number] = []
            for weight in update.weights:
                vals = update.state_shapes(weight)
                states[number].append(
                    [recorded.add_input("state", count + at, val) for at, val in enumerate(vals)]
                )
                count += len(vals)
        control = recorded.add_input("control", 0, torch.empty(0, device="meta"))
    base = 0
    for mark in marks:
        number = mark.args[0]
        _expand(recorded, mark, updates[number], states[number], control, base)
        base += len(updates[number].optimizer.param_groups)
    remove_dead(graph)
    if recorded.movable:
        operators.fuse(recorded.graph)
    recorded.graph.recompile()


def _expand(
    recorded: RecordedGraph,
    mark: Any,
    update: Update,
    states: list[list[Any]],
    control: Any,
    base: int,
) -> None:
    """An update of each weight in place of an optimizer's step."""
    graph = recorded.graph.graph
    _, weights, gradients = mark.args
    made: dict[Any, Any] = {}
    with graph.inserting_before(mark):
        for weight, of, gradient, mine in zip(
            weights, update.weights, gradients, states, strict=True
        ):
            target = getattr(torch.ops.hotloop, f"update{len(mine)}_").default
            row = base + update.group_of(of)
            laid_out = alike(graph, gradient, weight)
            made[weight] = graph.call_function(
                target, (weight, laid_out, *mine, control, None, row)
            )
    for value in list(mark.users):
        value.replace_input_with(mark, made[value.args[0]])
    graph.erase_node(mark)


def _marks(recorded: RecordedGraph) -> list[Any]:
    nodes: list[Any] = list(recorded.graph.graph.nodes)
    return [n for n in nodes if n.target is native.optimizer_step]


def _placeholder(node: Any) -> Any:
    return operators.memory_of(node)
