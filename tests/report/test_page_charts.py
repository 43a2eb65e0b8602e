"""Where things lie in a picture: bars, axes, marks and who is pinned where."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.machine.affinity import ThreadAffinity
from hotloop.report.chart import NARROW, WIDE, Axis, Frame, thinned
from hotloop.report.document import Document
from hotloop.report.elements import bar
from hotloop.report.learning import smoothed
from hotloop.report.phases import means_over, phase_rows
from hotloop.report.placement import machine_of, placement
from hotloop.report.roofline import roofline, roofs
from support import report_samples as samples

RANGES = st.tuples(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9)).map(lambda p: (p[0], p[0] + p[1]))
POSITIVE = st.tuples(st.floats(1e-9, 1e12), st.floats(1.05, 1e9)).map(lambda p: (p[0], p[0] * p[1]))


@given(RANGES.filter(lambda r: r[1] - r[0] > 1e-9 * abs(r[0])), st.sampled_from([4, 5, 7]))
def test_linear_ticks_are_round_few_and_inside(ends, most):
    ticks = Axis(*ends, "x", str).ticks(most)
    assert 1 <= len(ticks) <= most + 1
    slack = 1e-6 * (ends[1] - ends[0])
    assert all(ends[0] - slack <= tick <= ends[1] + slack for tick in ticks)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 3) for a, b in itertools.pairwise(ticks)}
    assert steps <= {1.0}


@given(POSITIVE, st.sampled_from([5, 7]))
def test_log_ticks_are_few_and_inside(ends, most):
    ticks = Axis(*ends, "x", str, log=True).ticks(most)
    assert len(ticks) <= most + 1
    assert all(ends[0] * 0.99 <= tick <= ends[1] * 1.01 for tick in ticks)
    if ends[1] / ends[0] > 10:
        assert ticks


def test_ticks_of_bytes_are_round_in_their_unit():
    ticks = Axis(0.0, 470e6, "", str, unit=2.0**20).ticks(5)
    assert ticks == [n * 100 * 2**20 for n in range(5)]
    assert Axis(0.0, 3.0, "", str, whole=True).ticks(7) == [0.0, 1.0, 2.0, 3.0]


def test_a_frame_places_values_linearly_or_by_logarithm():
    frame = Frame(WIDE, Axis(0.0, 10.0, "x", str), Axis(1.0, 100.0, "y", str, log=True))
    left, bottom = frame.at(0.0, 1.0)
    right, top = frame.at(10.0, 100.0)
    assert frame.at(5.0, 10.0) == pytest.approx(((left + right) / 2, (bottom + top) / 2))
    assert (left, top) == (WIDE.left, WIDE.top)
    # What lies outside stays at the edge.
    assert frame.at(99.0, 1e9) == pytest.approx((right, top))


def test_bars_are_as_wide_as_their_amounts():
    drawn = bar("three", [(1, 1.0), (2, 0.0), (3, 3.0)], 8.0)
    parts = [(p.get("x"), p.get("width"), p.get("class")) for p in drawn]
    assert parts == [("0.000%", "12.500%", "part fill1"), ("12.500%", "37.500%", "part fill3")]
    # More than the whole is cut, and a whole of nothing is an empty bar.
    assert [p.get("width") for p in bar("", [(1, 9.0)], 3.0)] == ["100.000%"]
    assert not list(bar("", [(1, 1.0)], 0.0))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=400))
def test_smoothing_neither_lags_nor_leaves_the_range(values):
    points = [(float(n), value) for n, value in enumerate(values)]
    smooth = [value for _, value in smoothed(points)]
    assert len(smooth) == len(values)
    assert min(values) - 1e-6 <= min(smooth)
    assert max(smooth) <= max(values) + 1e-6
    line = [(float(n), 3.0 * n) for n in range(len(values))]
    assert [v for _, v in smoothed(line)] == pytest.approx([v for _, v in line])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=300), st.integers(2, 50))
def test_thinning_keeps_the_ends(points, most):
    kept = thinned(points, most)
    assert len(kept) <= most + 1
    if points:
        assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_time_that_no_phase_covers_is_named():
    rows = phase_rows(Document({"time_s": {"evaluate": 1.0, "step": 5.0, "odd_one": 1.5},
                                "wall_s": 9.0}))  # fmt: skip
    assert [(title, seconds) for title, _, seconds in rows] == [
        ("steps", 5.0), ("evaluation", 1.0), ("odd one", 1.5), ("everything else", 1.5),
    ]  # fmt: skip
    assert phase_rows(Document({"time_s": {"step": 5.0}})) == [("steps", 1, 5.0)]


def test_rates_are_means_over_windows():
    # Calls of 0.25 s, looked at each 0.2 s: 100 samples a call, counted when it ends.
    looks = [round(0.2 * n, 1) for n in range(1, 31)]
    counted = [int(t / 0.25 + 1e-9) * 100 for t in looks]
    rates = [(now - before) / 0.2 for now, before in itertools.pairwise([*reversed(counted), 0])]
    points = list(zip(looks, reversed(rates), strict=True))
    assert {rate for _, rate in points} == {0.0, 500.0}
    means = means_over(points, 1.0)
    assert [t for t, _ in means] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [rate for _, rate in means] == pytest.approx([400.0] * 6)
    assert means_over([(0.25, 8.0)], 1.0) == [(0.25, 8.0)]
    assert means_over([(0.0, 7.0)], 1.0) == [(0.0, 7.0)]
    assert means_over([], 1.0) == []


# The roofline


def drawn_roofline(report, size):
    document = Document(report)
    whole = roofline(document, document.at("machine"))
    return next(svg for svg in whole.iter("svg") if svg.get("class") == f"chart {size.name}")


def test_each_operation_is_a_mark_below_its_roof():
    report = samples.report()
    for size in (WIDE, NARROW):
        svg = drawn_roofline(report, size)
        marks = [e for e in svg.iter() if (e.get("class") or "").startswith("mark")]
        assert len(marks) == len(report["operations"])
    # Two products of one shape but different rates lie above each other, the faster one higher.
    svg = drawn_roofline(report, WIDE)
    slow, fast = report["operations"][4], report["operations"][5]
    assert fast["flop_per_s"] > slow["flop_per_s"]
    circles = [(float(e.get("cx")), float(e.get("cy"))) for e in svg.iter("circle")]
    (x1, y1), (x2, y2) = circles[-1], circles[-2]
    assert x1 == x2
    assert y2 < y1
    # One decade is as long for marks as between ticks.
    ticks = {e.text: float(e.get("y")) for e in svg.iter("text") if e.get("text-anchor") == "end"}
    decade = ticks["100 G"] - ticks["1 T"]
    expected = decade * math.log10(fast["flop_per_s"] / slow["flop_per_s"])
    assert y1 - y2 == pytest.approx(expected, abs=0.02)


def test_roofs_are_those_of_the_runs_threads():
    report = samples.report()
    machine = Document(report["machine"])
    by_name = {roof.name: roof for roof in roofs(Document(report), machine)}
    assert by_name["float32"].rate == 429e9
    assert by_name["memory"].rate == pytest.approx(74.6e9)
    report["plan"]["cpu"]["num_threads"] = 1
    by_name = {roof.name: roof for roof in roofs(Document(report), machine)}
    assert by_name["float32"].rate == pytest.approx(429e9 / 2)
    # A count that was not measured: the best one, and the page says which.
    report["plan"]["cpu"]["num_threads"] = 7
    by_name = {roof.name: roof for roof in roofs(Document(report), machine)}
    assert (by_name["float32"].rate, by_name["float32"].num_threads) == (429e9, 2)
    # Without ceilings, the rate that the report was held against.
    del report["machine"]["ceilings"]
    (only,) = roofs(Document(report), Document(report["machine"]))
    assert (only.name, only.rate) == ("float32", 429e9)


# Who is pinned where


@pytest.mark.parametrize("affinity", ["compact", "spread", "3,1"])
def test_placement_follows_the_plan(affinity):
    document = samples.machine(sockets=2, cores=4, smt=2)
    machine = machine_of(Document(document))
    assert len(machine.cores) == 8
    cpus = ThreadAffinity.parse(affinity).cpus(machine, 2)
    plan = {"cpu": {"num_threads": 2, "thread_affinity": affinity}, "parallel": {}}
    labels, sentence = placement(Document({"plan": plan}), machine)
    assert labels == dict.fromkeys(cpus, "step")
    assert affinity in sentence
    plan["parallel"] = {"num_workers": 2}
    labels, _ = placement(Document({"plan": plan}), machine)
    assert labels == {cpus[0]: "worker 0", cpus[1]: "worker 1"}


def test_placement_that_is_not_known_is_not_made_up():
    machine = machine_of(Document(samples.machine()))
    none = {"plan": {"cpu": {"num_threads": 2, "thread_affinity": "none"}}}
    assert placement(Document(none), machine) == (
        {}, "Nothing is pinned: the kernel moves 2 threads among CPUs 0-1.",
    )  # fmt: skip
    many = {"plan": {"cpu": {"num_threads": 9, "thread_affinity": "compact"}}}
    assert placement(Document(many), machine)[0] == {}
    assert "cannot be told" in placement(Document(many), machine)[1]
    assert placement(Document({}), machine) == ({}, "Where threads ran is not recorded.")
    seen = {**none, "performance": {"workers": [{"worker": 0, "cpu": 1}, {"worker": 1, "cpu": 1}]}}
    assert placement(Document(seen), machine)[0] == {1: "worker 0, worker 1"}
