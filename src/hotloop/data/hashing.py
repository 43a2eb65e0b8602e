"""Random numbers as a pure function of counters: no generator, no state, no order.

A draw for sample 17 in epoch 3 is the same whichever batch, worker or host asks for it. The mixer
is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
whose output function is a bijection of 64-bit words that passes the usual test batteries.
"""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix(*words: int) -> int:
    """A 64-bit hash of integers, order included: ``mix(1, 2) != mix(2, 1)``."""
    state = 0
    for word in words:
        state = _mix64(state + _mix64((word & _MASK) + _GOLDEN))
    return state


def uniform(key: int, positions: torch.Tensor, num_draws: int) -> torch.Tensor:
    """Numbers in [0, 1) for each position.

    Args:
        key: which stream, from ``mix(seed, epoch, ...)``.
        positions: int64 ``[n]``, sample positions.
        num_draws: how many independent numbers for each.

    Returns:
        float64 ``[n, num_draws]``; element i, j depends on ``key``, ``positions[i]`` and j alone.
    """
    streams = torch.tensor([_signed(mix(key, draw)) for draw in range(num_draws)])
    state = positions[:, None] * _signed(_GOLDEN) + streams
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


def _mix64(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shift_right(words: torch.Tensor, count: int) -> torch.Tensor:
    # torch shifts int64 with its sign; the mixer is defined on unsigned words.
    return (words >> count) & ((1 << (64 - count)) - 1)
