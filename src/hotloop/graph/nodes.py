"""What passes ask of a graph's nodes."""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import fx
from torch._library.utils import is_impure


def arguments(node: Any) -> dict[str, Any]:
    """The arguments of a call of ATen by name, in the operator's order, defaults filled in."""
    expected = node.target._schema.arguments
    given = dict(zip([a.name for a in expected], node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in expected}


def parts(node: Any) -> dict[int, Any]:
    """The results of a node that has several, by number; what nobody reads is missing."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}


def add_parts(node: Any, count: int) -> list[Any]:
    """Nodes of the first results of a node that has several, where nodes are being inserted."""
    made = [node.graph.call_function(operator.getitem, (node, n)) for n in range(count)]
    for part, val in zip(made, node.meta["val"], strict=False):
        part.meta["val"] = val
    return made


def take_parts(node: Any, olds: dict[int, Any]) -> None:
    """Let results of a node, by number, stand for other nodes; where nodes are being inserted."""
    for number, old in olds.items():
        part = node.graph.call_function(operator.getitem, (node, number))
        part.meta["val"] = node.meta["val"][number]
        old.replace_all_uses_with(part)


def only_reader(node: Any) -> Any:
    """The one node that reads a value; ``None``: there are more, or the graph gives it."""
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and readers[0].op != "output" else None


def remove_dead(graph: fx.Graph) -> None:
    """Remove operations whose results nobody reads and that do nothing else.

    As ``eliminate_dead_code`` of a graph, which takes as long as some passes: it checks the whole
    graph first, and asks of each node anew what depends on the operation alone.
    """
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not _does_more(node.target):
            graph.erase_node(node)


@functools.cache
def _does_more(target: Any) -> bool:
    """Whether an operation writes, draws random numbers or acts outside of the graph."""
    return bool(is_impure(target))
