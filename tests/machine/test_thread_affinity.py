"""Where threads go on captured machines, and pinning on this one."""

import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.errors import PlanError, RunError
from hotloop.machine import Machine, ThreadAffinity, give_way, pinned, pinned_thread

COMPACT = ThreadAffinity.parse("compact")
SPREAD = ThreadAffinity.parse("spread")

can_pin = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot pin threads"
)


@pytest.mark.parametrize("text", ["none", "compact", "spread", "0", "0,2,4-6", "5,3,0-1"])
def test_parse_and_str_round_trip(text):
    affinity = ThreadAffinity.parse(text)
    assert str(affinity) == text
    assert ThreadAffinity.parse(str(affinity)) == affinity


@given(st.lists(st.integers(0, 300), min_size=1, unique=True))
def test_any_list_round_trips_in_order(cpu_ids):
    affinity = ThreadAffinity("list", tuple(cpu_ids))
    assert ThreadAffinity.parse(str(affinity)).cpu_ids == tuple(cpu_ids)


@pytest.mark.parametrize(
    "text", ["", "dense", "0,", "1-", "3-1", "-1", "0,0", "1-3,2", "list", "0;1"]
)
def test_bad_text_is_refused_in_one_line(text):
    with pytest.raises(PlanError) as caught:
        ThreadAffinity.parse(text)
    assert "thread_affinity must" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_none_pins_nothing(probe):
    assert ThreadAffinity.parse("none").cpus(probe("xeon"), 99) == ()


def test_compact_fills_a_socket_then_the_next_then_the_siblings(probe):
    assert COMPACT.cpus(probe("xeon"), 16) == (*range(16),)


def test_spread_goes_over_the_sockets_in_turn_siblings_last(probe):
    expected = (0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
    assert SPREAD.cpus(probe("xeon"), 16) == expected


def test_compact_keeps_threads_on_a_node(probe):
    machine = probe("epyc")
    node_of = {cpu: node.id for node in machine.numa_nodes for cpu in node.cpu_ids}
    assert [node_of[cpu] for cpu in COMPACT.cpus(machine, 6)] == [0, 0, 1, 1, 2, 2]


def test_spread_visits_each_of_eight_nodes_before_any_twice(probe):
    machine = probe("epyc")
    node_of = {cpu: node.id for node in machine.numa_nodes for cpu in node.cpu_ids}
    socket_of = {core.cpu_ids[0]: core.socket for core in machine.cores}
    cpus = SPREAD.cpus(machine, 8)
    assert sorted(node_of[cpu] for cpu in cpus) == list(range(8))
    assert [socket_of[cpu] for cpu in cpus] == [0, 1] * 4


@pytest.mark.parametrize("affinity", [COMPACT, SPREAD], ids=str)
def test_performance_cores_then_efficiency_cores_then_siblings(probe, affinity):
    cpus = affinity.cpus(probe("laptop"), 12)
    assert cpus == (0, 2, 4, 6, 8, 9, 10, 11, 1, 3, 5, 7)


def test_spread_over_caches_inside_a_node(probe):
    caches = {
        f"sys/devices/system/cpu/cpu{cpu}/cache/index3/shared_cpu_list": (
            "0-3" if cpu < 4 else "4-7"
        )
        for cpu in range(8)
    }
    assert SPREAD.cpus(probe("graviton", caches), 4) == (0, 4, 1, 5)


@pytest.mark.parametrize("affinity", [COMPACT, SPREAD], ids=str)
def test_only_usable_cpus_and_a_lone_sibling_counts_as_first(probe, affinity):
    machine = probe("xeon", {"proc/self/status": "Cpus_allowed_list:\t1,8-9,12\n"})
    cpus = affinity.cpus(machine, 4)
    assert sorted(cpus[:3]) == [1, 8, 12]
    assert cpus[3] == 9


@pytest.mark.parametrize("affinity", [COMPACT, SPREAD], ids=str)
@pytest.mark.parametrize("name", ["xeon", "epyc", "laptop", "graviton"])
def test_each_cpu_is_given_once(probe, affinity, name):
    machine = probe(name)
    cpus = affinity.cpus(machine, len(machine.cpu_ids))
    assert sorted(cpus) == list(machine.cpu_ids)
    assert affinity.cpus(machine, 3) == cpus[:3]


@pytest.mark.parametrize("affinity", [COMPACT, SPREAD], ids=str)
def test_without_topology_cpus_in_order(affinity):
    assert affinity.cpus(Machine(cpu_ids=(2, 3, 9), usable_cpus=3), 2) == (2, 3)


def test_list_is_taken_in_its_order(probe):
    assert ThreadAffinity.parse("7,0-2").cpus(probe("xeon"), 3) == (7, 0, 1)


def test_list_outside_the_usable_cpus_is_refused(probe):
    machine = probe("xeon", {"proc/self/status": "Cpus_allowed_list:\t0-3\n"})
    with pytest.raises(PlanError, match=r"CPU 12.*choose among 0-3"):
        ThreadAffinity.parse("0,12").cpus(machine, 1)


@pytest.mark.parametrize("text", ["compact", "spread", "0-1"])
def test_more_threads_than_cpus_is_refused(probe, text):
    machine = probe("xeon", {"proc/self/status": "Cpus_allowed_list:\t0-1\n"})
    with pytest.raises(PlanError, match="num_threads must be at most the 2 CPUs"):
        ThreadAffinity.parse(text).cpus(machine, 3)


@can_pin
def test_pinned_confines_every_thread_and_restores_each():
    before = os.sched_getaffinity(0)
    target = {min(before)}
    stop, started = threading.Event(), threading.Event()
    ids: list[int] = []

    def wait() -> None:
        ids.append(threading.get_native_id())
        started.set()
        stop.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    try:
        with pinned(target):
            assert os.sched_getaffinity(0) == target
            assert os.sched_getaffinity(ids[0]) == target
            assert Machine.probe().cpu_ids == tuple(target)
        assert os.sched_getaffinity(0) == before
        assert os.sched_getaffinity(ids[0]) == before
    finally:
        stop.set()
        thread.join()


@can_pin
def test_a_thread_started_inside_gets_the_mask_of_the_entering_thread():
    before = os.sched_getaffinity(0)
    stop, started = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), stop.wait()))
    try:
        with pinned({max(before)}):
            thread.start()
            started.wait()
            assert os.sched_getaffinity(thread.native_id) == {max(before)}
        assert os.sched_getaffinity(thread.native_id) == before
    finally:
        stop.set()
        thread.join()


@can_pin
def test_pinned_restores_after_an_error_and_when_nested():
    before = os.sched_getaffinity(0)
    with pytest.raises(KeyError), pinned({min(before)}):
        raise KeyError
    assert os.sched_getaffinity(0) == before
    with pinned(before), pinned({max(before)}):
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before


@can_pin
@pytest.mark.parametrize("context", [pinned, pinned_thread])
@pytest.mark.parametrize("with_good", [False, True])
def test_a_cpu_the_kernel_refuses_changes_nothing(context, with_good):
    before = os.sched_getaffinity(0)
    wanted = {max(os.sched_getaffinity(0)) + 900} | (before if with_good else set())
    with pytest.raises(RunError, match="the kernel allows this process"), context(wanted):
        pytest.fail("entered")
    assert os.sched_getaffinity(0) == before


@can_pin
def test_pinned_thread_leaves_other_threads_alone():
    before = os.sched_getaffinity(0)
    seen: dict[str, set[int]] = {}

    def work() -> None:
        with pinned_thread({min(before)}):
            seen["inside"] = os.sched_getaffinity(0)
            seen["main"] = os.sched_getaffinity(threading.main_thread().native_id)
        seen["after"] = os.sched_getaffinity(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {"inside": {min(before)}, "main": before, "after": before}


@pytest.mark.parametrize("context", [pinned, pinned_thread])
def test_pinning_to_nothing_changes_nothing(context):
    before = Machine.probe().cpu_ids
    with context(()):
        assert Machine.probe().cpu_ids == before


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_a_thread_gives_way_alone_with_those_it_starts():
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = nice()
    seen: dict[str, int] = {}

    def work() -> None:
        give_way(before + 3)
        seen["own"] = nice()
        started = threading.Thread(target=lambda: seen.update(started=nice()))
        started.start()
        started.join()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {"own": before + 3, "started": before + 3}
    assert nice() == before
