"""Arrays for the batches of an instance, and the first calls of an engine."""

from __future__ import annotations

import contextlib
from functools import partial

import numpy

from ..infer import Engine
from ..measure import Turns
from .cost import CostCurve
from .tensors import Signature

# One array for each input, ``None`` where its size is not known but for the batch.
Buffers = list[numpy.ndarray | None]
_WARM_UP_S = 0.25


def make_buffers(signature: Signature, max_batch: int) -> Buffers:
    """Arrays of ``max_batch`` rows, as far as sizes are known."""
    buffers: Buffers = []
    for spec in signature.inputs:
        rest = spec.shape[1:] if signature.batched else spec.shape
        if not signature.batched or any(size is None for size in rest):
            buffers.append(None)
        else:
            shape = [max_batch, *(size for size in rest if size is not None)]
            buffers.append(numpy.zeros(shape, dtype=spec.dtype))
    return buffers


def warm_up(engine: Engine, buffers: Buffers, curve: CostCurve) -> None:
    """The first calls allocate and compile; the second ones are measured, for ``curve``."""
    whole = _whole(buffers)
    if not whole:
        return
    calls = {
        rows: partial(engine.run, [buffer[:rows] for buffer in whole])
        for rows in (1, len(whole[0]))
    }
    for played in Turns(calls, rounds=3, limit_s=_WARM_UP_S, warm_calls=1):
        for rows, turn in played.items():
            curve.anchor(rows, turn.median_s)


def warm_up_together(engine: Engine, buffers: Buffers) -> None:
    """The largest call, made by all instances at once: what memory that takes is taken now.

    Else it would be under the first load, where it looks like a leak.
    """
    whole = _whole(buffers)
    if whole:
        with contextlib.suppress(Exception):  # Requests will find out, and the log tells.
            engine.run(whole)


def _whole(buffers: Buffers) -> list[numpy.ndarray]:
    """All arrays; none where one of them has no size."""
    whole = [buffer for buffer in buffers if buffer is not None]
    return whole if len(whole) == len(buffers) else []
