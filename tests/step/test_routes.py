"""A kernel chosen by timing is kept, and chosen again where a neighbour disturbed it."""

from dataclasses import replace

import pytest

from hotloop.graph import routes
from hotloop.measure import winners


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(monkeypatch, kernel, quiet=True):
    """What a new process takes for "key" where a race would find ``kernel``."""
    monkeypatch.setattr(routes, "_found_here", {})
    return routes.remembered("key", lambda: (kernel, {kernel: 1.0}, quiet)).kernel


def test_a_choice_made_beside_a_neighbour_is_made_again_by_the_next_run(cache, monkeypatch):
    assert run(monkeypatch, "slow", quiet=False) == "slow"
    # Still disturbed: no reason to compile the step anew.
    assert run(monkeypatch, "other", quiet=False) == "slow"
    assert run(monkeypatch, "fast") == "fast"
    assert run(monkeypatch, "other") == "fast"


def test_within_a_run_the_choice_stays(cache, monkeypatch):
    assert run(monkeypatch, "slow", quiet=False) == "slow"
    again = routes.remembered("key", lambda: ("other", {"other": 1.0}, True))
    assert again.kernel == "slow"


def test_other_kernels_are_another_question(cache, monkeypatch):
    assert run(monkeypatch, "old") == "old"
    monkeypatch.setattr(routes, "_kernels_key", lambda: "changed")
    assert run(monkeypatch, "new") == "new"


@pytest.mark.parametrize("answer", ["nonsense", ["good"], None])
def test_a_damaged_answer_is_timed_again(cache, monkeypatch, answer):
    assert run(monkeypatch, "good") == "good"
    ((_, kept),) = winners.listed()
    winners.add([replace(kept, answer=answer)])
    assert run(monkeypatch, "better") == "better"
