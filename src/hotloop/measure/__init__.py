"""Everything that is decided by a stopwatch is decided here. Importing loads no torch.

Read it in this order:

clock       the one clock
neighbours  who else works on this machine, and how long this process waited for a processor
turns       candidates take turns: the one loop that calls them and reads the clock
least       a rule: the least time of each, for kernels
interval    a confidence interval that holds at every look
pairs       a rule: the ratio of A and B, until the answer is clear, for programs and plans
medians     a rule: the lowest median, the clearly slower ones dropped early, for engines
winners     what was decided on this machine before, in one cache
product_winners  kernels of the products of a running program, which times them itself
ceilings    the best rates that anything reached here

A new measurement gives its candidates to ``Turns``, or to a rule, and keeps what won in
``winners``. ``Machine`` is here because measuring its ceilings is.
"""

from typing import TYPE_CHECKING

from ..lazy import names_in

if TYPE_CHECKING:
    from ..machine import Machine
    from . import ceilings, winners
    from .clock import now, timed
    from .interval import always_valid_interval
    from .least import Timing, least_seconds
    from .medians import Standing, race, steadiest
    from .pairs import Comparison, compare
    from .turns import Candidate, Turn, Turns, in_order, rotating, take_turn, there_and_back
    from .winners import Winner

_MODULE_OF = {
    "Candidate": "turns",
    "Comparison": "pairs",
    "Machine": "ceilings",
    "Standing": "medians",
    "Timing": "least",
    "Turn": "turns",
    "Turns": "turns",
    "Winner": "winners",
    "always_valid_interval": "interval",
    "compare": "pairs",
    "in_order": "turns",
    "least_seconds": "least",
    "now": "clock",
    "race": "medians",
    "rotating": "turns",
    "steadiest": "medians",
    "take_turn": "turns",
    "there_and_back": "turns",
    "timed": "clock",
}

__all__ = [
    "Candidate",
    "Comparison",
    "Machine",
    "Standing",
    "Timing",
    "Turn",
    "Turns",
    "Winner",
    "always_valid_interval",
    "ceilings",
    "compare",
    "in_order",
    "least_seconds",
    "now",
    "race",
    "rotating",
    "steadiest",
    "take_turn",
    "there_and_back",
    "timed",
    "winners",
]

__getattr__ = names_in(__name__, _MODULE_OF)
