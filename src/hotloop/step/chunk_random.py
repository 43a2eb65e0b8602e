"""Random numbers of a chunk as a function of its key: the same whoever draws them, and when.

One generator cannot serve chunks that run in any order. So what a graph draws from torch's
generator (dropout, noise) is drawn here from a hash (``data.hashing``) of the chunk's key, the
number of the operation in the graph, and the position in its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..data.hashing import GOLDEN, mix, random_floats, scrambled, signed

_aten = torch.ops.aten


def draws(graph: fx.GraphModule) -> bool:
    """Whether ``graph`` has operations that ``Drawing`` replaces."""
    return any(node.target in _RULES for node in graph.graph.nodes)


def foreign(graph: fx.GraphModule) -> str | None:
    """An operation that draws from torch's generator; ``None``: none does."""
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return str(node.target)
    return None


class Drawing(fx.Interpreter):
    """Runs a graph, drawing from a key, int64 ``[1]``, in place of torch's generator."""

    def __init__(self, graph: fx.GraphModule, key: torch.Tensor) -> None:
        super().__init__(graph)
        self._key, self._number = key, 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As the base class, but for what draws."""
        rule = _RULES.get(target)
        if rule is None:
            return super().call_function(target, args, kwargs)
        self._number += 1
        return rule(self._number, self._key, *args, **kwargs)


def uniform(key: torch.Tensor, number: int, shape: Sequence[int], half: int = 0) -> torch.Tensor:
    """float32 in [0, 1) of ``shape``.

    Args:
        key: of the chunk, int64 ``[1]``. number: of the operation in the graph.
        half: a second set of numbers where one operation needs two.
    """
    stream = scrambled(key + signed(mix(number, half)))
    # Not stream + golden * position: the compiler would compute the range of that, beyond int64.
    counters = torch.arange(math.prod(shape), dtype=torch.int64) ^ stream
    return random_floats(scrambled(counters * signed(GOLDEN))).reshape(list(shape))


def normal(key: torch.Tensor, number: int, shape: Sequence[int]) -> torch.Tensor:
    """float32 of mean 0 and variance 1 of ``shape`` (Box and Muller 1958)."""
    radius = torch.sqrt(-2.0 * torch.log(1.0 - uniform(key, number, shape)))
    return radius * torch.cos(2.0 * math.pi * uniform(key, number, shape, 1))


def _native_dropout(number: int, key: torch.Tensor, x: torch.Tensor, p: float, train: Any) -> Any:
    if not train or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    keep = uniform(key, number, x.shape) >= p
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1 else 0.0), 0.0), keep


def _bernoulli_p(number: int, key: torch.Tensor, x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    return (uniform(key, number, x.shape) < p).to(x.dtype)


def _bernoulli(number: int, key: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return (uniform(key, number, p.shape) < p).to(p.dtype)


def _rand(number: int, key: torch.Tensor, shape: Any, **options: Any) -> torch.Tensor:
    return uniform(key, number, _shape(shape)).to(options.get("dtype") or torch.float32)


def _randn(number: int, key: torch.Tensor, shape: Any, **options: Any) -> torch.Tensor:
    return normal(key, number, _shape(shape)).to(options.get("dtype") or torch.float32)


def _rand_like(number: int, key: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return uniform(key, number, x.shape).to(options.get("dtype") or x.dtype)


def _randn_like(number: int, key: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return normal(key, number, x.shape).to(options.get("dtype") or x.dtype)


def _uniform(
    number: int, key: torch.Tensor, x: torch.Tensor, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    return (low + (high - low) * uniform(key, number, x.shape)).to(x.dtype)


def _normal(
    number: int, key: torch.Tensor, x: torch.Tensor, mean: float = 0.0, std: float = 1.0
) -> torch.Tensor:
    return (mean + std * normal(key, number, x.shape)).to(x.dtype)


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.native_dropout.default: _native_dropout,
    _aten.bernoulli.p: _bernoulli_p,
    _aten.bernoulli.default: _bernoulli,
    _aten.rand.default: _rand,
    _aten.randn.default: _randn,
    _aten.rand_like.default: _rand_like,
    _aten.randn_like.default: _randn_like,
    _aten.uniform.default: _uniform,
    _aten.normal_functional.default: _normal,
}


def _shape(shape: Any) -> list[int]:
    return [int(size) for size in shape]
