"""NUMA placement: rules on captured machines, pinning and memory policy on this one."""

import contextlib
import mmap
import os
import threading

import pytest

from hotloop.errors import PlanError, RunError
from hotloop.machine import Machine, numa
from hotloop.machine.mempolicy import MODES, MemoryPolicy, get_memory_policy, set_memory_policy


def kernel_policy_works() -> bool:
    try:
        found = get_memory_policy()
        set_memory_policy(found)
    except RunError:
        return False
    return True


HERE = Machine.probe()
NODE = HERE.numa_nodes[0].id if HERE.numa_nodes else None
needs_kernel = pytest.mark.skipif(
    NODE is None or not kernel_policy_works(), reason="the kernel refuses memory policies here"
)


@needs_kernel
@pytest.mark.parametrize("policy", ["bind", "interleave", "local"])
def test_policy_is_set_and_restored(policy):
    before = get_memory_policy()
    with numa.memory_policy(policy, [NODE]):
        inside = get_memory_policy()
        assert inside.name == policy
        assert inside.nodes == (() if policy == "local" else (NODE,))
    assert get_memory_policy() == before


@needs_kernel
def test_nested_policies_restore_the_outer_one():
    with numa.memory_policy("interleave", [NODE]):
        with pytest.raises(KeyError), numa.memory_policy("bind", [NODE]):
            raise KeyError
        assert get_memory_policy() == MemoryPolicy(MODES["interleave"], (NODE,))


def test_default_makes_no_system_call(monkeypatch):
    monkeypatch.setattr("hotloop.machine.mempolicy._SYSCALLS", {})
    with numa.memory_policy("default"):
        pass
    with pytest.raises(RunError, match="memory policy can be set on 64-bit Linux"):
        get_memory_policy()


@needs_kernel
@pytest.mark.parametrize("node", [1023, 5000, -1])
def test_a_node_the_kernel_does_not_have_is_one_line(node):
    before = get_memory_policy()
    with (
        pytest.raises(RunError, match="set its memory policy; got bind on nodes") as caught,
        numa.memory_policy("bind", [node]),
    ):
        pytest.fail("entered")
    assert "\n" not in str(caught.value)
    assert get_memory_policy() == before


@needs_kernel
def test_a_page_lands_on_the_bound_node():
    with numa.memory_policy("bind", [NODE]), mmap.mmap(-1, 1 << 20) as block:
        block.write(b"x" * (1 << 20))
        with open("/proc/self/numa_maps") as maps:
            bound = [line for line in maps if f" bind:{NODE} " in line and f" N{NODE}=" in line]
    assert bound


@needs_kernel
def test_configure_applies_and_restores():
    cpus, policy = os.sched_getaffinity(0), get_memory_policy()
    with numa.configure([NODE, NODE], "bind", HERE) as binding:
        assert os.sched_getaffinity(0) == set(HERE.numa_nodes[0].cpu_ids) & cpus
        assert get_memory_policy() == MemoryPolicy(MODES["bind"], (NODE,))
        seen = []

        def work() -> None:
            with binding.worker(1):
                seen.append((os.sched_getaffinity(0), get_memory_policy()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [(os.sched_getaffinity(0), MemoryPolicy(MODES["bind"], (NODE,)))]
    assert (os.sched_getaffinity(0), get_memory_policy()) == (cpus, policy)
    binding.restore()
    assert (os.sched_getaffinity(0), get_memory_policy()) == (cpus, policy)


@needs_kernel
def test_configure_takes_effect_without_with():
    before = get_memory_policy()
    binding = numa.configure((), "interleave", HERE)
    assert get_memory_policy().name == "interleave"
    binding.restore()
    assert get_memory_policy() == before


@needs_kernel
def test_a_refused_policy_undoes_the_pinning(monkeypatch):
    cpus = os.sched_getaffinity(0)
    monkeypatch.setitem(MODES, "local", 77)
    with pytest.raises(RunError):
        numa.configure([NODE], "local", HERE)
    assert os.sched_getaffinity(0) == cpus


def test_workers_take_the_cpus_and_memory_of_their_nodes(probe, monkeypatch):
    calls = []

    def record(name):
        return lambda *arguments: calls.append((name, *arguments)) or contextlib.nullcontext()

    monkeypatch.setattr(numa, "pinned", lambda cpus: record("process")(sorted(cpus)))
    monkeypatch.setattr(numa, "pinned_thread", record("thread"))
    monkeypatch.setattr(numa, "memory_policy", record("policy"))
    machine = probe("epyc", {"proc/self/status": "Cpus_allowed_list:\t0-2,14-15\n"})
    binding = numa.configure([1, 7], "bind", machine)
    assert calls == [("process", [2, 14, 15]), ("policy", "bind", (1, 7))]
    calls.clear()
    for index in range(3):
        with binding.worker(index):
            pass
    assert calls == [
        ("thread", (2,)), ("policy", "bind", (1,)),
        ("thread", (14, 15)), ("policy", "bind", (7,)),
        ("thread", (2,)), ("policy", "bind", (1,)),
    ]  # fmt: skip
    calls.clear()
    with numa.configure([1, 7], "interleave", machine).worker(0):
        pass
    assert calls[-2:] == [("thread", (2,)), ("policy", "interleave", (1, 7))]


def test_default_without_nodes_does_nothing():
    cpus = HERE.cpu_ids
    with numa.configure((), "default", HERE) as binding, binding.worker(3):
        assert Machine.probe().cpu_ids == cpus


@pytest.mark.parametrize(
    ("nodes", "policy", "rule"),
    [
        ([8], "default", r"must name NUMA nodes of this machine; got 8.*choose among: 0, 1"),
        ([3], "default", r"nodes with CPUs this process may use; got 3"),
        ([], "bind", r"bind needs NUMA nodes"),
        ([0], "near", r"allocation_policy must be one of default, local, bind, interleave"),
    ],
)
def test_wrong_placements_are_refused(probe, nodes, policy, rule):
    machine = probe("epyc", {"proc/self/status": "Cpus_allowed_list:\t0-5\n"})
    with pytest.raises(PlanError, match=rule):
        numa.configure(nodes, policy, machine)


def test_unknown_nodes_are_refused():
    with pytest.raises(PlanError, match="none known"):
        numa.configure([0], "default", Machine(cpu_ids=(0,)))
