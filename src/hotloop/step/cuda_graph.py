"""Recording work on a CUDA device in a graph that stands on memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_WARM_UPS = 3
Result = TypeVar("Result")


def record(call: Callable[[], Result]) -> tuple[Any, Result]:
    """A graph of what ``call`` launches on the current device, and what it returned.

    What it returned lies in the graph's memory and is written again by each ``replay``. Three calls
    are made before: libraries choose kernels and compilers run then. Other threads may use the
    device meanwhile.

    The workspaces of cuBLAS are let go before and after. PyTorch keeps them for each stream, and
    all graphs are recorded on one: the workspace that the first graph had allocated would serve the
    others, and they would write to freed memory once somebody clears the workspaces
    (``torch.compile(mode="reduce-overhead")`` does) after the first graph has gone.
    """
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            call()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph, result
