"""How often a shape of batch must come before a program of it pays for its making.

To record two steps and to build a program takes as long as some plain steps: two or three of a
convolutional network, hundreds of a GRU whose operations are many and tiny. The first shapes are
recorded at once. What their programs cost and save says how often any other one must come first:
whoever waits until what could have been saved comes to twice the cost loses little, however the
run goes on (the ski-rental rule). With sequences of sixty lengths most stay plain, or not, by that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

# Shapes that are recorded when they first come: the batch, and the smaller one that ends an epoch.
_AT_ONCE = 2
# Runs of a program until its time is believed.
_RUNS = 3
# What could have been saved, over what is paid.
_CAUTION = 2.0
NEVER = 2**31


@dataclass
class Patience:
    """What is known of costs and gains in one run.

    Attributes:
        steps: how often a shape must have come; ``None``: not known yet, so it waits.
    """

    steps: int | None = None
    _of: Hashable = None
    _plain_s: float = 0.0
    _cost_s: float = 0.0
    _program_s: float = math.inf
    _runs: int = 0

    def allows(self, seen: int, begun: int) -> bool:
        """Whether a shape that came ``seen`` times before is recorded now.

        Args:
            begun: shapes whose recording has begun.
        """
        return begun < _AT_ONCE or (self.steps is not None and seen >= self.steps)

    def note_build(
        self, plain_s: float, overhead_s: float, build_s: float, of: Hashable = None
    ) -> None:
        """A program was made.

        Args:
            of: the shape; until the program's time is believed, no other one is looked at.
            plain_s: a plain step of this shape. overhead_s: recording one took more.
        """
        if self.steps is None and (self._runs == 0 or of == self._of):
            self._of, self._plain_s, self._cost_s = of, plain_s, 2 * overhead_s + build_s
            self._program_s, self._runs = math.inf, 0

    def note_run(self, program_s: float, of: Hashable = None) -> None:
        """A step ran as the program of a shape."""
        if self.steps is not None or of != self._of:
            return
        self._program_s, self._runs = min(self._program_s, program_s), self._runs + 1
        if self._runs == _RUNS:
            gain_s = self._plain_s - self._program_s
            waits = _CAUTION * self._cost_s / gain_s if gain_s > 0 else NEVER
            self.steps = min(NEVER, math.ceil(waits))
