"""Settings and fixtures shared by all tests."""

import collections

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


_LONG_ROOMS = ("parallel", "train", "step", "bench")


def pytest_configure(config):
    """A worker of pytest-xdist shares the CPUs: threads that spin would cost the others."""
    if hasattr(config, "workerinput"):
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The arena's file first, which wants a process nobody has used; then the rooms that take long.

    Each file runs in one process (``--dist loadfile --no-loadscope-reorder``), in this order: a
    long file at the end would keep one process waiting.
    """
    sizes = collections.Counter(item.path for item in items)

    def place(item):
        is_later = item.path.name != "test_tensor_arena.py"
        return is_later, item.path.parent.name not in _LONG_ROOMS, -sizes[item.path], item.path

    items.sort(key=place)


@pytest.fixture(scope="session")
def arena_available():
    """Skips where there is no tensor arena; asked for when a test runs, as it may take seconds."""
    from hotloop.memory import TensorArena

    if not TensorArena.available():
        pytest.skip(f"no arena: {TensorArena.unavailable_reason()}")
