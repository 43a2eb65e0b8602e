"""Shared by the tests of inference."""

import pytest

from hotloop.measure import medians


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Races of one test are not remembered in another, nor in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True, scope="module")
def short_turns():
    """Which engine wins is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medians, "TURN_S", 0.001)
        yield
