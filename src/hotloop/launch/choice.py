"""Which of two ways a launched script takes: both are timed in its first calls."""

from __future__ import annotations

import math

# Calls of each way before the first choice, and in each later look.
_TRIES, _AGAIN = 3, 2
# At which call both are looked at again: 64, 256, 1,024, ...
_FIRST_LOOK, _LOOK_FACTOR = 64, 4


class Choice:
    """torch's way, or hotloop's, of the same work.

    The least time decides: a neighbour only ever slows a call down. Where torch may not be timed
    against (``torch.use_deterministic_algorithms``) ask ``fastest`` alone.

    Attributes:
        least_s: least seconds of torch's way and of hotloop's; infinite: not tried.
    """

    def __init__(self) -> None:
        self.least_s = [math.inf, math.inf]
        self._calls = 0
        self._left = 2 * _TRIES
        self._look_at = _FIRST_LOOK

    @property
    def fastest(self) -> bool:
        """Whether hotloop's way is the faster one, as far as is known."""
        return self.least_s[1] < self.least_s[0]

    def next(self) -> bool:
        """Whether the next call is hotloop's."""
        self._calls += 1
        if self._calls == self._look_at:
            self._look_at *= _LOOK_FACTOR
            self._left = 2 * _AGAIN
            self.least_s = [math.inf, math.inf]
        if self._left:
            self._left -= 1
            return self._left % 2 == 1
        return self.fastest

    def note(self, ours: bool, seconds: float) -> None:
        """What a call took."""
        self.least_s[ours] = min(self.least_s[ours], seconds)
