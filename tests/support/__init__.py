"""What several test files share; ``tests`` is on the path: ``from support.x import y``."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent

# The profile of hypothesis, by its name in scripts/check: fast, check or full; none by hand.
PROFILE = os.environ.get("HOTLOOP_HYPOTHESIS", "hotloop")


def examples(count: int) -> int:
    """How many examples a test draws: ``count``, a quarter of it in the daily check."""
    return count // 4 if PROFILE in ("fast", "check") else count
