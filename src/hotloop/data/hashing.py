"""Random numbers as a pure function of counters: no generator, no state, no order.

A draw for sample 17 in epoch 3 is the same whichever batch, worker or host asks for it. The mixer
is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),
whose output function is a bijection of 64-bit words that passes the usual test batteries. Importing
loads no torch: ``mix`` is asked in processes without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def mix(*words: int) -> int:
    """A 64-bit hash of integers, order included: ``mix(1, 2) != mix(2, 1)``."""
    state = 0
    for word in words:
        state = _mix64(state + _mix64((word & _MASK) + GOLDEN))
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
    import torch

    streams = torch.tensor([signed(mix(key, draw)) for draw in range(num_draws)])
    words = random_words(positions[:, None], streams)
    return _shift_right(words, 11).to(torch.float64) * 2.0**-53


def random_words(positions: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
    """64 random bits for each position and stream, int64; splitmix64 started at the stream."""
    return scrambled(positions * signed(GOLDEN) + streams)


def scrambled(words: torch.Tensor) -> torch.Tensor:
    """The output function of splitmix64 on int64."""
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        words = (words ^ _shift_right(words, shift)) * signed(factor)
    return words ^ _shift_right(words, 31)


def random_floats(words: torch.Tensor) -> torch.Tensor:
    """The upper 24 bits of each word as float32 in [0, 1)."""
    import torch

    return _shift_right(words, 40).to(torch.float32) * 2.0**-24


def _mix64(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def signed(word: int) -> int:
    """The 64 bits of ``word`` as torch's int64 has them."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(words: torch.Tensor, count: int) -> torch.Tensor:
    # torch shifts int64 with its sign; the mixer is defined on unsigned words.
    return (words >> count) & ((1 << (64 - count)) - 1)
