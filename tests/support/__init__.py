"""What several test files share; ``tests`` is on the path: ``from support.x import y``."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent

# The profile of hypothesis, by its name in scripts/check: fast, check or full; none by hand.
PROFILE = os.environ.get("HOTLOOP_HYPOTHESIS", "hotloop")


# What a test need not try in the daily check: more workers, more kills, more places to stop.
THOROUGH = PROFILE not in ("fast", "check")


def examples(count: int) -> int:
    """How many examples a test draws: ``count``, a quarter of it in the daily check."""
    return count if THOROUGH else count // 4
