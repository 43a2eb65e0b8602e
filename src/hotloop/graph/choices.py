"""Which of several kernels makes an operation: timed once, remembered, kept for the whole run.

A choice is taken, in this order, from this run (or the one it resumes), from what was timed on this
machine before, from an operation that differs in its sizes alone and by little, and else by timing.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple

import torch

from .. import kernels
from ..machine.heap import give_back_memory
from ..measure import Winner, winners

# What this process uses, by question: a choice holds for the whole run.
_found_here: dict[str, Winner] = {}
# What was timed or recalled here: what an operation is but for its sizes -> sizes -> its question.
_sizes_of: dict[Hashable, dict[tuple[int, ...], str]] = {}
# Raised when timings are taken in another way: earlier ones are then forgotten.
_TIMING = 5
# A step waits for it.
ROUNDS, LIMIT_S = 3, 0.06
# Sizes that differ by no more than this factor, all in all, have the same fastest kernel: batches
# of fifty lengths would else be timed fifty times, 60 ms for each operation.
_MOST_APART = 4.0

# Inside ``own_kernels``: nothing is timed.
_only_own = False

Race = Callable[[], tuple[str, dict[str, float], bool]]


class Route(NamedTuple):
    """The chosen kernel, and the least seconds of each candidate; empty: it was not timed here."""

    kernel: str
    seconds: dict[str, float]


def choose(key: str, race: Race, kind: Hashable = None, sizes: tuple[int, ...] = ()) -> Route:
    """The kernel of the operation with this key.

    Args:
        race: times the candidates: the fastest, seconds of each, whether the processors were ours.
            What was found beside a busy neighbour holds for this run; the next one times again.
        kind: what the operation is but for its ``sizes``; ``None``: no other one stands for it.
    """
    if _only_own:
        return Route("hotloop", {})
    question = f"kernel/{key}"
    versions = _versions()
    known = _found_here.get(question) or winners.recall(question, versions)
    is_settled = known is not None and (known.quiet or question in _found_here)
    if known is not None and known.seconds and known.answer not in list(known.seconds):
        known, is_settled = None, False  # Damaged.
    if known is None and kind is not None:
        near = _nearest(kind, sizes)
        if near is not None:
            answer = _found_here[near].answer
            known = Winner(question=question, answer=answer, versions=versions, quiet=False)
            _found_here[question] = known
            return Route(answer, {})
    if known is None or not is_settled:
        kernel, seconds, quiet = race()
        give_back_memory()
        if known is None or quiet:
            known = Winner(
                question=question, answer=kernel, versions=versions, seconds=seconds, quiet=quiet
            )
            winners.add([known])
    _found_here[question] = known
    if known.seconds and kind is not None:
        _sizes_of.setdefault(kind, {})[sizes] = question
    return Route(known.answer, dict(known.seconds))


def operand(*sizes: int) -> torch.Tensor:
    """What a candidate is timed on: no kernel asks for the values, and drawing them takes longer
    than many products."""
    return torch.full(sizes, 0.5)


@contextlib.contextmanager
def own_kernels() -> Iterator[None]:
    """While it lasts, hotloop's own kernel makes each operation: for programs without torch."""
    global _only_own
    before, _only_own = _only_own, True
    try:
        yield
    finally:
        _only_own = before


def _nearest(kind: Hashable, sizes: tuple[int, ...]) -> str | None:
    """The question about the nearest sizes of this kind; ``None``: none is near enough."""

    def apart(others: tuple[int, ...]) -> float:
        pairs = zip(sizes, others, strict=True)
        return math.prod(max(a, b) / max(1, min(a, b)) for a, b in pairs)

    known = _sizes_of.get(kind, {})
    best = min(known, key=lambda others: (apart(others), others), default=None)
    return known[best] if best is not None and apart(best) <= _MOST_APART else None


def made_here() -> dict[str, str]:
    """All choices of this run, by question: for a run that goes on with it."""
    return {question: winner.answer for question, winner in _found_here.items()}


def go_on(choices: Mapping[str, str]) -> None:
    """Choose what another run chose; what this process chose already stays."""
    for question, answer in choices.items():
        winner = Winner(question=question, answer=answer, versions=_versions(), quiet=False)
        _found_here.setdefault(question, winner)


def _versions() -> dict[str, str]:
    return {**winners.versions_of("torch"), "kernels": _kernels_key()}


@functools.cache
def _kernels_key() -> str:
    """Other kernels or another way to time them, other times."""
    return f"{kernels.build_hash()[:8]}-{_TIMING}"
