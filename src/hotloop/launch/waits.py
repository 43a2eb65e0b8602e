"""How long a script waits for its DataLoader."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Waits:
    """What the loaders took, in the thread that asks them for batches.

    Attributes:
        seconds: spent in getting batches. batches: how many.
        num_workers: the most any loader had; ``None``: no loader was used.
    """

    seconds: float = 0.0
    batches: int = 0
    num_workers: int | None = None


waits = Waits()
_installed = False


def install() -> None:
    """Time what each loader takes to hand out a batch; once a process."""
    global _installed
    if _installed:
        return
    _installed = True
    module: Any = torch.utils.data.dataloader
    # Below __next__, so that a warning raised there still names the line of the script.
    for cls in (module._SingleProcessDataLoaderIter, module._MultiProcessingDataLoaderIter):
        cls._next_data = _timed(cls._next_data)


def _timed(plain: Any) -> Any:
    @functools.wraps(plain)
    def _next_data(self: Any) -> Any:
        started = time.perf_counter()
        try:
            data = plain(self)
            waits.batches += 1
            return data
        finally:
            waits.seconds += time.perf_counter() - started
            waits.num_workers = max(waits.num_workers or 0, self._num_workers)

    return _next_data
