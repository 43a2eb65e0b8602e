"""The random numbers of torch, NumPy and Python, taken, compared and put back together."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """The generators that programs draw from where they name none."""

    torch_state: torch.Tensor
    python_state: Any
    numpy_state: Any

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        return cls(torch.random.get_rng_state(), random.getstate(), np.random.get_state())

    def put_back(self) -> None:
        """Make them as they were."""
        torch.random.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)

    def unchanged(self) -> bool:
        """Whether nobody has drawn since."""
        now = RandomState.now()
        return (
            torch.equal(self.torch_state, now.torch_state)
            and self.python_state == now.python_state
            and _equal(self.numpy_state, now.numpy_state)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values and arrays, for a checkpoint."""
        return {
            "torch": self.torch_state,
            "python": self.python_state,
            "numpy": self.numpy_state,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> RandomState:
        """What ``to_dict`` gave."""
        return cls(document["torch"], document["python"], document["numpy"])


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.put_back()


def seed_all(seed: int) -> None:
    """Seed the three.

    Args:
        seed: 0 to 2**63 - 1.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def _equal(a: Any, b: Any) -> bool:
    """Of what ``numpy.random.get_state`` gives: texts, numbers and arrays in tuples or dicts."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(np.array_equal(a, b))
