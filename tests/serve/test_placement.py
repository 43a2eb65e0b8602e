"""Which CPUs the instances of an engine are pinned to."""

import pytest

from hotloop.cli import serve
from hotloop.errors import PlanError
from hotloop.machine import Machine


class Shape:
    def __init__(self, num_instances, num_threads):
        self.num_instances = num_instances
        self.num_threads = num_threads


class Eight:
    usable_cpus = 8
    cpu_ids = tuple(range(8))
    cores = ()
    last_level_caches = ()


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(Machine, "probe", classmethod(lambda cls: Eight()))


@pytest.mark.parametrize(
    ("num_instances", "num_threads", "affinity", "cpus"),
    [
        (2, 2, "compact", [(0, 1), (2, 3)]),
        (7, 1, "compact", [(0,), (1,), (2,), (3,), (4,), (5,), (6,)]),
        (8, 1, "compact", []),  # None would be left for the event loop.
        (4, 4, "compact", []),
        (1, 4, "compact", []),
        (2, 1, "none", []),
        (2, 1, "5,3", [(5,), (3,)]),
        (8, 1, "0-7", [(n,) for n in range(8)]),  # Asked for by name.
    ],
)
def test_instances_are_pinned_where_a_cpu_is_left(num_instances, num_threads, affinity, cpus):
    found = serve._place(Shape(num_instances, num_threads), affinity)
    assert [tuple(each) for each in found] == cpus


def test_a_list_that_is_too_short_is_refused():
    with pytest.raises(PlanError, match="at most the 2 CPUs"):
        serve._place(Shape(3, 1), "0,1")
