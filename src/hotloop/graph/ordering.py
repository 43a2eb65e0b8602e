"""The order of a graph that reads again what it has written, as a train function does.

Each value of a tensor that was there before the step is a node: its placeholder, and after each
write a ``native.version``. Whoever reads one must run before the next write. Passes know nothing of
that, so the order is made anew after them.
"""

from __future__ import annotations

import heapq
import operator
from typing import Any

import torch
from torch import fx

from . import native
from .operators import UPDATES, aliases

# Written by updates alone, each after the one before it since it reads the weight that made.
_ORDERED = ("state", "control")


def settle(graph: fx.Graph) -> bool:
    """Put readers of each value before the write that ends it; False: no order does that.

    Random numbers are drawn in the order in which they were; an update comes as early as it may.
    """
    (output,) = (n for n in graph.nodes if n.op == "output")
    nodes: list[Any] = [n for n in graph.nodes if n.op == "call_function"]
    before: dict[Any, set[Any]] = {
        n: {i for i in n.all_input_nodes if i.op == "call_function"} for n in nodes
    }
    readers: dict[Any, list[Any]] = {}
    last_draw = None
    for node in nodes:
        if node.target is not native.version:
            for used in node.all_input_nodes:
                readers.setdefault(value_behind(used), []).append(node)
        if _draws(node):
            if last_draw is not None:
                before[node].add(last_draw)
            last_draw = node
    for node in nodes:
        for value in values_written(node):
            before[node].update(r for r in readers.get(value, ()) if r is not node)
    order = _sorted(nodes, before)
    if order is None:
        return False
    for node in order:
        output.prepend(node)
    return True


def _sorted(nodes: list[Any], before: dict[Any, set[Any]]) -> list[Any] | None:
    """Each node after those before it, as they stand where that leaves a choice."""
    after: dict[Any, list[Any]] = {}
    for node, others in before.items():
        for other in others:
            after.setdefault(other, []).append(node)
    waits = {node: len(others) for node, others in before.items()}
    place = {node: (node.target not in UPDATES, number) for number, node in enumerate(nodes)}
    at = {number: node for node, (_, number) in place.items()}
    ready = [place[node] for node in nodes if waits[node] == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        node = at[heapq.heappop(ready)[1]]
        order.append(node)
        for other in after.get(node, ()):
            waits[other] -= 1
            if waits[other] == 0:
                heapq.heappush(ready, place[other])
    return order if len(order) == len(nodes) else None


def value_behind(node: Any) -> Any:
    """The placeholder or version whose memory a view is a part of; else the node that made it."""
    while node.op == "call_function" and node.target is not native.version:
        if node.target is operator.getitem or aliases(node):
            node = node.all_input_nodes[0]
        else:
            break
    return node


def values_written(node: Any) -> list[Any]:
    """The values of tensors that were there before the step, into which a node writes."""
    if node.op != "call_function":
        return []
    targets: list[Any] = []
    if node.target is native.batch_norm:
        targets = [running for running in node.args[3] if running is not None]
    elif node.target is native.add_count:
        targets = [node.args[0]]
    elif node.target is native.optimizer_step:
        targets = list(node.args[1])
    elif isinstance(node.target, torch._ops.OpOverload):
        for place, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            targets += given if isinstance(given, (list, tuple)) else [given]
    values = [value_behind(t) for t in targets if isinstance(t, fx.Node)]
    return [v for v in values if _was_there(v)]


def _was_there(value: Any) -> bool:
    if value.target is native.version:
        return True
    return value.op == "placeholder" and value.meta["input"][0] not in _ORDERED


def readers_before_writes(graph: fx.Graph) -> set[Any]:
    """What reads a value whose memory is written, and read again, later.

    Together with what comes after the write it could be in no operation.
    """
    ended = {n.args[0] for n in graph.nodes if n.target is native.version}
    if not ended:
        return set()
    return {n for n in graph.nodes if ended & {value_behind(i) for i in n.all_input_nodes}}


def inputs_written(graph: fx.Graph) -> list[tuple[str, int]]:
    """Kind and number of each input that the graph writes into."""
    found: dict[tuple[str, int], None] = {}
    for node in graph.nodes:
        for value in values_written(node):
            while value.op == "call_function":
                value = value.args[0]
            found[value.meta["input"]] = None
    return list(found)


def _draws(node: Any) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target is native.draw or torch.Tag.nondeterministic_seeded in tags
