"""Side-by-side benchmarks against peers: equal work, interleaved, each in its own process.

peers   what each peer does in an epoch
peer    the process of one peer
race    the coordinator
result  figures, table, JSON
"""

from .race import race_training
from .result import Race, Timing

__all__ = ["Race", "Timing", "race_training"]
