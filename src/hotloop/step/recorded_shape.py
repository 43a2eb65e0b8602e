"""What a recorded step knows of batches of one shape, and what it asks of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..graph.from_recording import RecordedGraph
from ..graph.program import Program
from ..graph.recording import Recording, version_of
from .chunk import Chunk
from .guards import Guards
from .updates import Update

FIRST_AUDIT = 16
# Inputs that are made for a program, and not recorded.
_OWN = ("control", "key")


@dataclass
class Shape:
    """What is known of batches of one shape."""

    recording: Recording | None = None
    recordings: int = 0
    # How often it came before it was worth recording, and whether that has begun.
    seen: int = 0
    begun: bool = False
    # Seconds of forward and backward in the last recording, and what recording took beside them.
    plain_s: float = 0.0
    overhead_s: float = 0.0
    changes: int = 0
    refusal: str | None = None
    # Python's random numbers were drawn: the next recording finds out where.
    draws: bool = False
    # Of two recordings that say the same: a program may be built.
    agreed: Guards | None = None
    guards: Guards | None = None
    graph: RecordedGraph | None = None
    program: Program | None = None
    # In place of a program, where workers run chunks.
    chunk: Chunk | None = None
    bound: Any = None
    arena_bytes: int = 0
    # Parts of the batch that the program reads; x given as y too is one.
    batch_parts: list[int] = field(default_factory=list)
    programs_run: int = 0
    next_audit: int = FIRST_AUDIT
    update: Update | None = None
    counters: list[torch.Tensor] = field(default_factory=list)
    steps_done: float = 0.0
    # Which kernel makes each product and convolution, and what others took.
    routes: list[Any] = field(default_factory=list)
    convolutions: list[Any] = field(default_factory=list)
    # Products that the program rounds: it is recorded without autocast.
    rounds: bool = False

    @property
    def is_fast(self) -> bool:
        """Whether batches of this shape run as a program."""
        return self.graph is not None


def kind_of(tensor: torch.Tensor) -> Any:
    """What a sum of gradients must have alike with its weight."""
    return tensor.shape, tensor.dtype


def sum_of(weight: torch.Tensor) -> torch.Tensor:
    """Where gradients of a weight are added up: what is in ``grad``, if that may be used."""
    fresh = torch.zeros_like(weight, requires_grad=False, device="meta")
    if weight.grad is not None and layout_of(weight.grad) == layout_of(fresh):
        return weight.grad
    return torch.zeros_like(weight, requires_grad=False)


def layout_of(tensor: torch.Tensor) -> Any:
    """What a program takes for constant of a tensor that it reads."""
    return tensor.shape, tensor.stride(), tensor.dtype


def change_of_layout(graph: RecordedGraph, inputs: Sequence[torch.Tensor | None]) -> str | None:
    """Whether a graph's inputs lie otherwise than when it was recorded.

    Args:
        inputs: a tensor for each; ``None``: part of the batch.
    """
    nodes = [n for n in graph.graph.graph.nodes if n.op == "placeholder"]
    for (kind, _), node, tensor in zip(graph.inputs, nodes, inputs, strict=True):
        if tensor is None or kind in _OWN or node.meta["val"] is None:
            continue
        if layout_of(tensor) != layout_of(node.meta["val"]):
            return f"a {kind} has another shape, layout or dtype than before"
    return None


def is_sparse(gradient: torch.Tensor | None) -> bool:
    """Whether there is a gradient that is not dense."""
    return gradient is not None and gradient.layout != torch.strided


def constants_changed(graph: RecordedGraph) -> str | None:
    """Whether a tensor from outside was written since it was recorded."""
    for tensor, version in graph.constants:
        if version_of(tensor) != version:
            return "a tensor that the step reads from outside was written"
    return None


def reason_of_weights(optimizer: torch.optim.Optimizer) -> str | None:
    """Why a program cannot make the update of these weights; ``None``: it can."""
    dtypes = {p.dtype for g in optimizer.param_groups for p in g["params"]} - {torch.float32}
    if dtypes:
        return f"weights are {', '.join(sorted(str(d) for d in dtypes))}, so torch makes the update"
    return None
