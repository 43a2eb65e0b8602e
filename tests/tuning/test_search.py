"""Successive halving on made-up trials; the journal that lets it go on."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.errors import InputError, RunError
from hotloop.tuning import PRESENT, Group, Journal, key_of, search, text_of


class Bench:
    """Costs by knob, multiplied; a clock that only trials move; optional noise and failures."""

    def __init__(self, factors=None, *, noise=0.0, seed=0, prepare_s=2.0, slice_s=0.25):
        self.factors = factors or {}
        self.noise, self.random = noise, random.Random(seed)
        self.prepare_s, self.slice_s, self.now_s = prepare_s, slice_s, 0.0
        self.ready, self.released, self.measured = set(), [], []
        self.cannot, self.dies = {}, {}

    def clock(self):
        return self.now_s

    def prepare(self, candidates):
        failures = {}
        for candidate in candidates:
            key = key_of(candidate)
            if key in self.ready:
                continue
            self.now_s += self.prepare_s
            if key in self.cannot:
                failures[key] = self.cannot[key]
            else:
                self.ready.add(key)
        return failures

    def true_cost(self, candidate):
        cost = 1.0
        for name, value in candidate.items():
            cost *= self.factors.get((name, value), 1.0)
        return cost

    def measure(self, candidate):
        key = key_of(candidate)
        assert key in self.ready
        self.measured.append(key)
        self.now_s += self.slice_s
        if self.dies.get(key, math.inf) <= self.measured.count(key):
            raise RunError("the trial must go on", got="killed")
        return self.true_cost(candidate) * (1 + self.random.gauss(0, self.noise))

    def release(self, candidate):
        self.released.append(key_of(candidate))
        self.ready.discard(key_of(candidate))


GROUPS = (
    Group("cores", ({"threads": 1}, {"threads": 2}, {"workers": 2, "pin": "yes"})),
    Group("compile", ({"compile": "off"},)),
    Group("pin", ({"pin": "yes"}, {"pin": "no"})),
    Group("queue", ({"queue": 1}, {"queue": 16})),
)
FACTORS = {("threads", 2): 0.8, ("workers", 2): 0.6, ("compile", "off"): 2.0, ("queue", 16): 0.9}


def run(bench, groups=GROUPS, budget_s=600.0, **kwargs):
    return search(groups, bench, budget_s, clock=bench.clock, **kwargs)


def test_it_finds_the_best_and_tells_what_it_tried():
    found = run(Bench(FACTORS, noise=0.02))
    assert found.best == {"workers": 2, "pin": "yes", "queue": 16}
    assert found.units == {"cores": {"workers": 2, "pin": "yes"}, "queue": {"queue": 16}}
    outcomes = {(t.group, text_of(t.candidate)): t.outcome for t in found.tried}
    assert outcomes["cores", "the present plan"] == "lost"
    assert outcomes["cores", "threads 2"] == "lost"
    assert outcomes["cores", "workers 2, pin yes"] == "won"
    assert outcomes["compile", "workers 2, pin yes"] == "kept"
    won = next(t for t in found.tried if t.outcome == "won" and t.group == "cores")
    assert won.ratio == pytest.approx(1 / 0.6, rel=0.05)
    assert json.loads(json.dumps(won.to_dict()))["n"] == len(won.costs)


def test_a_later_group_takes_a_knob_over():
    found = run(Bench({**FACTORS, ("pin", "yes"): 1.3}))
    assert found.best["pin"] == "no"
    assert found.units["cores"] == {"workers": 2}
    assert found.units["pin"] == {"pin": "no"}


def test_the_present_plan_stays_where_nothing_is_faster():
    found = run(Bench({("threads", 1): 1.2, ("workers", 2): 1.1, ("compile", "off"): 3.0}))
    assert found.best == PRESENT
    assert not found.units
    assert {t.outcome for t in found.tried} == {"kept", "lost"}


@settings(max_examples=40)
@given(
    factors=st.lists(st.floats(0.3, 3.0), min_size=8, max_size=8),
    noise=st.floats(0.0, 0.03),
    seed=st.integers(0, 1000),
)
def test_it_is_near_the_best_of_all(factors, noise, seed):
    """Independent choices: the sum of groups finds what the product would."""
    groups = tuple(Group(str(g), tuple({f"k{g}": c} for c in range(2))) for g in range(4))
    table = {(f"k{g}", c): factors[2 * g + c] for g in range(4) for c in range(2)}
    bench = Bench(table, noise=noise, seed=seed)
    found = run(bench, groups)
    best = 1.0
    for g in range(4):
        best *= min(1.0, *factors[2 * g : 2 * g + 2])
    assert bench.true_cost(found.best) <= best * 1.02**4 * (1 + 3 * noise)


@settings(max_examples=30)
@given(budget_s=st.floats(0.5, 80.0))
def test_the_budget_is_kept_but_for_the_group_under_way(budget_s):
    bench = Bench(FACTORS, noise=0.02)
    found = run(bench, budget_s=budget_s)
    # A group that began prepares its choices and makes two rounds.
    most = max(len(g.choices) + 1 for g in GROUPS)
    assert found.elapsed_s <= budget_s + most * (bench.prepare_s + 2 * 3 * bench.slice_s)
    untried = [t for t in found.tried if t.outcome == "not tried"]
    assert all(t.reason == "the time was spent" for t in untried)
    names = {t.group for t in found.tried}
    assert names == {g.name for g in GROUPS}


def test_what_cannot_run_is_told_and_the_rest_goes_on():
    bench = Bench(FACTORS)
    bench.cannot[key_of({"workers": 2, "pin": "yes"})] = "no compiler"
    bench.dies[key_of({"threads": 2})] = 2
    found = run(bench)
    reasons = {text_of(t.candidate): t.reason for t in found.tried if t.outcome == "failed"}
    assert reasons["workers 2, pin yes"] == "no compiler"
    assert "killed" in reasons["threads 2"]
    assert found.best == {"queue": 16}


def test_the_present_plan_must_run():
    bench = Bench()
    bench.cannot[key_of(PRESENT)] = "out of memory"
    with pytest.raises(RunError, match="out of memory"):
        run(bench)
    with pytest.raises(InputError, match="above 0"):
        run(Bench(), budget_s=0)


def test_a_group_that_cannot_matter_is_left_out():
    groups = (*GROUPS[:3], Group("queue", GROUPS[3].choices, unless=lambda best: "no queue"))
    found = run(Bench(FACTORS), groups)
    assert {t.reason for t in found.tried if t.group == "queue"} == {"no queue"}


def test_losers_are_released_and_the_present_plan_is_kept():
    bench = Bench(FACTORS)
    found = run(bench)
    assert bench.ready == {key_of(PRESENT), key_of(found.best)}


class Cut(Exception):
    pass


@settings(max_examples=30, deadline=None)
@given(cut_at=st.integers(1, 120), torn=st.integers(0, 40))
def test_a_search_cut_off_anywhere_goes_on_and_measures_nothing_twice(
    tmp_path_factory, cut_at, torn
):
    path = tmp_path_factory.mktemp("journal") / "search.journal"
    whole = run(Bench(FACTORS))

    bench = Bench(FACTORS)
    calls = 0

    def cut(progress):
        nonlocal calls
        calls += 1
        if calls > cut_at:
            raise Cut

    identity = {"model": "m"}
    try:
        run(bench, journal=Journal(path, identity), on_progress=cut)
        finished = True
    except Cut:
        finished = False
    with path.open("ab") as file:  # The line under way when the power went.
        file.write(b'{"kind": "round", "group": "cores", "costs": {"'[:torn])
    again = Bench(FACTORS)
    again.prepare_s = 0.0
    journal = Journal(path, identity)
    found = run(again, journal=journal)
    assert (found.best, found.units) == (whole.best, whole.units)
    assert [t.candidate for t in found.tried] == [t.candidate for t in whole.tried]
    assert [t.outcome for t in found.tried] == [t.outcome for t in whole.tried]
    if finished:
        assert again.measured == []
    else:
        # Nothing but what the first sitting did not get to, and one round under way at most.
        assert len(again.measured) + len(bench.measured) <= len_of(whole) + 4
    assert journal.elapsed_s >= Journal(path, identity).records[0]["elapsed_s"]


def len_of(result):
    return sum(len(t.costs) for t in result.tried)


def test_the_journal_of_another_search_is_refused(tmp_path):
    path = tmp_path / "j"
    Journal(path, {"model": "a"}).close()
    with pytest.raises(InputError, match="journal of this search"):
        Journal(path, {"model": "b"})
    path.write_text("not a journal\n")
    journal = Journal(path, {"model": "a"})
    assert journal.records == []
