"""All passes over a recorded graph whose operations may be moved, in their order."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import (
    batch_norm,
    batch_products,
    convolutions,
    copies,
    draws,
    elementwise,
    images,
    layouts,
    losses,
    pooling,
    routes,
    rows,
)
from .from_recording import RecordedGraph
from .ordering import settle


class Chosen(NamedTuple):
    """Which kernel makes each product and convolution, and what others took."""

    routes: list[Any]
    convolutions: list[Any]


def optimize(recorded: RecordedGraph, num_threads: int, *, rounds: bool = False) -> Chosen | None:
    """Replace what hotloop's kernels make, in place.

    Args:
        num_threads: threads inside each kernel.
        rounds: whether products round their factors to bfloat16.

    Returns:
        ``None``: the operations that are left have no order that is right (``ordering``).
    """
    graph = recorded.graph
    pooling.fuse(graph)
    products = routes.route(graph, num_threads, rounds=rounds)
    convolved = convolutions.route(graph, num_threads)
    batch_products.route(graph, num_threads)
    copies.remove(graph)
    draws.fuse(graph)
    images.replace(graph)
    batch_norm.replace(graph)
    losses.fuse(graph)
    rows.replace(graph)
    layouts.replace(graph)
    elementwise.fuse(graph)
    if not settle(graph.graph):
        return None
    graph.recompile()
    return Chosen(products, convolved)
