"""A graph of inference from ``torch.export``, and the passes that make layers of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

from . import batch_norm_folding, copies, epilogues

Constants = dict[fx.Node, torch.Tensor]


def graph_of(program: torch.export.ExportedProgram) -> tuple[fx.Graph, Constants]:
    """A copy of the program's graph, and the tensor of each placeholder of a weight or buffer."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    targets |= signature.inputs_to_lifted_tensor_constants
    stored: dict[str, Any] = {**program.state_dict, **program.constants}
    graph = copy.deepcopy(program.graph)
    nodes: list[Any] = list(graph.nodes)
    return graph, {n: stored[targets[n.name]].detach() for n in nodes if n.name in targets}


def layers_of(program: torch.export.ExportedProgram) -> tuple[fx.Graph, Constants]:
    """The same as operators of ``layers``, each with what its kernel does in one pass.

    Args:
        program: of a model in eval mode. What no layer does stays as ATen has it.
    """
    graph, constants = graph_of(program)
    copies.remove_identities(graph)
    batch_norm_folding.fold(graph, constants)
    epilogues.fuse(graph)
    return graph, constants
