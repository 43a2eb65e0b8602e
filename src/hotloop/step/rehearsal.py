"""A small step captured, so that resident memory tells what capturing brings.

PyTorch's tracing modules, hotloop's kernels and the graphs themselves are 25 to 35 MiB that belong
to no tensor; the user's own graph adds about 2 MiB. See ``memory.rehearsal``, which does the same
for the kernels of a plain step.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import nn

from .. import kernels
from ..errors import RunError
from .capture import capture
from .updates import Update


@functools.cache
def rehearse_capture() -> None:
    """Capture the step of a tiny model; once in a process, 0.3 seconds."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        weights: list[torch.Tensor] = list(model.parameters())
        update = Update(torch.optim.Adam(weights), weights, None, None)
        x, y = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
        capture(model, nn.functional.cross_entropy, x, y, update=update)
        with contextlib.suppress(RunError):  # Where there are none the step itself will say so.
            kernels.use_torch()
