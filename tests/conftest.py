"""Settings shared by all tests."""

from hypothesis import settings

# Machines are shared: the time of one example says nothing.
settings.register_profile("hotloop", deadline=None)
settings.load_profile("hotloop")
