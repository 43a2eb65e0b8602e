"""Settings and fixtures shared by all tests."""

import pytest
from hypothesis import settings

from support import PROFILE

# Machines are shared: the time of one example says nothing.
settings.register_profile("hotloop", deadline=None)
# A check draws the same examples for the same code, so that it fails for what a change did; new
# examples are drawn wherever pytest is called by hand.
for name in ("fast", "check", "full"):
    settings.register_profile(name, deadline=None, derandomize=True)
settings.load_profile(PROFILE)


@pytest.fixture(scope="session")
def arena_available():
    """Skips where there is no tensor arena; asked for when a test runs, as it may take seconds."""
    from hotloop.memory import TensorArena

    if not TensorArena.available():
        pytest.skip(f"no arena: {TensorArena.unavailable_reason()}")
