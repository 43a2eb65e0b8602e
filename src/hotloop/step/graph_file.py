"""A captured graph as plain values, and back.

Pickling a ``GraphModule`` traces its code anew, which folds what it takes for constants; here nodes
travel as they are.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map


class NodeName(NamedTuple):
    """Stands for the result of the node of that name."""

    name: str


def to_values(graph: fx.GraphModule) -> dict[str, Any]:
    """Nodes in order, and the constant tensors they name.

    Raises:
        ValueError: a node calls something that is not an operator.
    """
    nodes = []
    constants = {}
    for node in graph.graph.nodes:
        target = node.target
        if node.op == "call_function":
            if target is operator.getitem:
                target = "getitem"
            elif isinstance(target, torch._ops.OpOverload):
                target = str(target)
            else:
                raise ValueError(f"{target} is not an operator")
        elif node.op == "get_attr":
            constants[target] = getattr(graph, target)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: NodeName(n.name))
        nodes.append((node.op, node.name, target, args, dict(kwargs)))
    return {"nodes": nodes, "constants": constants}


def from_values(values: dict[str, Any]) -> fx.GraphModule:
    """The graph again, without the shapes that tracing noted."""
    graph = fx.Graph()
    root = torch.nn.Module()
    for name, tensor in values["constants"].items():
        root.register_buffer(name, tensor)
    made: dict[str, fx.Node] = {}

    def named(value: Any) -> Any:
        return made[value.name] if isinstance(value, NodeName) else value

    for op, name, target, args, kwargs in values["nodes"]:
        args, kwargs = tree_map(named, (args, kwargs), is_leaf=lambda v: isinstance(v, NodeName))
        if op == "call_function":
            target = operator.getitem if target == "getitem" else _operator(target)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return fx.GraphModule(root, graph)


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part)
    return found
