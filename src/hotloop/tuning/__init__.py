"""Searching by measurement; knows nothing of trainers, which hand it trials.

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
from .journal import Journal
from .plan_text import plan_with_comments
from .search import SearchProgress, SearchResult, Trial, Tried, search
from .space import BATCH_SIZE, PRECISION, LrRule, knobs_of, learning_rate_factor, space_of

__all__ = [
    "BATCH_SIZE",
    "PRECISION",
    "PRESENT",
    "Candidate",
    "Group",
    "Journal",
    "LrRule",
    "SearchProgress",
    "SearchResult",
    "Trial",
    "Tried",
    "key_of",
    "knobs_of",
    "learning_rate_factor",
    "plan_with_comments",
    "search",
    "space_of",
    "text_of",
]
