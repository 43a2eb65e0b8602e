"""Settings shared by all tests."""

import os

from hypothesis import settings

# Machines are shared: the time of one example says nothing.
settings.register_profile("hotloop", deadline=None)
# The whole check draws the same examples for the same code, so that it fails for what a change
# did; new examples are drawn wherever pytest is called by hand.
settings.register_profile("check", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HOTLOOP_HYPOTHESIS", "hotloop"))
