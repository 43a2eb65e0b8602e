"""A kernel chosen by timing is kept, and chosen again where a neighbour disturbed it."""

from dataclasses import replace

import pytest

from hotloop.graph import choices
from hotloop.measure import winners


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(monkeypatch, kernel, quiet=True):
    """What a new process takes for "key" where a race would find ``kernel``."""
    monkeypatch.setattr(choices, "_found_here", {})
    monkeypatch.setattr(choices, "_sizes_of", {})
    return choices.choose("key", lambda: (kernel, {kernel: 1.0}, quiet)).kernel


def test_a_choice_made_beside_a_neighbour_is_made_again_by_the_next_run(cache, monkeypatch):
    assert run(monkeypatch, "slow", quiet=False) == "slow"
    # Still disturbed: no reason to compile the step anew.
    assert run(monkeypatch, "other", quiet=False) == "slow"
    assert run(monkeypatch, "fast") == "fast"
    assert run(monkeypatch, "other") == "fast"


def test_within_a_run_the_choice_stays(cache, monkeypatch):
    assert run(monkeypatch, "slow", quiet=False) == "slow"
    again = choices.choose("key", lambda: ("other", {"other": 1.0}, True))
    assert again.kernel == "slow"


def test_other_kernels_are_another_question(cache, monkeypatch):
    assert run(monkeypatch, "old") == "old"
    monkeypatch.setattr(choices, "_kernels_key", lambda: "changed")
    assert run(monkeypatch, "new") == "new"


@pytest.mark.parametrize("answer", ["nonsense", ["good"], None])
def test_a_damaged_answer_is_timed_again(cache, monkeypatch, answer):
    assert run(monkeypatch, "good") == "good"
    ((_, kept),) = winners.listed()
    winners.add([replace(kept, answer=answer)])
    assert run(monkeypatch, "better") == "better"


def test_sizes_near_a_timed_one_are_not_timed(cache, monkeypatch):
    run(monkeypatch, "any")
    timed = []

    def chosen(rows, kernel, kind="nt"):
        def race():
            timed.append(rows)
            return kernel, {kernel: 1.0}, True

        return choices.choose(f"{kind}/{rows}", race, kind, (rows, 64))

    assert chosen(32, "mkl").kernel == "mkl"
    assert chosen(1024, "onednn").kernel == "onednn"
    assert [chosen(rows, "other") for rows in (8, 100, 128)] == [("mkl", {})] * 3
    assert chosen(256, "other").kernel == "onednn"
    assert chosen(32, "own", kind="nn").kernel == "own"
    assert timed == [32, 1024, 32]
    # A choice taken from a neighbour stands for no other one.
    assert chosen(8 * 4 * 4, "other").kernel == "mkl"
    assert chosen(1, "own").kernel == "own"


def test_a_run_goes_on_with_the_choices_of_another(cache, monkeypatch):
    assert run(monkeypatch, "fast") == "fast"
    kept = choices.made_here()
    monkeypatch.setattr(choices, "_found_here", {})
    choices.go_on(kept | {"kernel/other": "mkl"})
    assert choices.choose("other", lambda: pytest.fail("timed")) == ("mkl", {})
    assert choices.made_here() == kept | {"kernel/other": "mkl"}
