"""The number of threads inside torch's operations, set and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import PlanError


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run torch's operations of the calling thread with ``count`` threads; restores what it found.

    Raises:
        PlanError: ``count`` is not at least 1.
    """
    import torch

    if count < 1:
        raise PlanError(
            "num_threads must be at least 1", got=count, next_step="pass --num-threads 1"
        )
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
