"""Choosing by measurement; knows nothing of trainers, which hand it trials.

interval    a confidence interval that holds at every look
compare     A and B in turn until the answer is clear
candidate   a difference to the present plan; groups of them
space       the choices worth trying on a machine
search      successive halving under a time budget
journal     a search cut off goes on where it was
plan_text   a plan file whose lines carry their proof
remembered  results by machine and model

The package is not named ``tune``: that is the public function ``hotloop.tune``, which a package of
the same name would hide once imported.
"""

from .candidate import PRESENT, Candidate, Group, key_of, text_of
from .compare import Comparison, compare
from .interval import always_valid_interval
from .journal import Journal
from .plan_text import plan_with_comments
from .search import SearchProgress, SearchResult, Trial, Tried, search
from .space import BATCH_SIZE, PRECISION, LrRule, knobs_of, learning_rate_factor, space_of

__all__ = [
    "BATCH_SIZE",
    "PRECISION",
    "PRESENT",
    "Candidate",
    "Comparison",
    "Group",
    "Journal",
    "LrRule",
    "SearchProgress",
    "SearchResult",
    "Trial",
    "Tried",
    "always_valid_interval",
    "compare",
    "key_of",
    "knobs_of",
    "learning_rate_factor",
    "plan_with_comments",
    "search",
    "space_of",
    "text_of",
]
