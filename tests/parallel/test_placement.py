"""Where workers go: a pure function on captured machines, and what the kernel says on this one."""

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hotloop import Machine, Plan, PlanError, kernels
from hotloop.errors import RunError
from hotloop.machine.mempolicy import get_memory_policy, set_memory_policy
from hotloop.parallel import ParallelStep, default_num_workers, place_workers
from hotloop.parallel.placement import placed
from hotloop.parallel.processes import ProcessTeam

Probe = Callable[..., Machine]
needs_kernels = pytest.mark.skipif(not kernels.is_available(), reason="no kernels here")


def plan(affinity: str = "none", nodes: tuple[int, ...] = (), policy: str = "default") -> Plan:
    return Plan().replace(
        {
            "cpu.thread_affinity": affinity,
            "numa.node_assignments": nodes,
            "numa.allocation_policy": policy,
        }
    )


def node_of(machine: Machine) -> dict[int, int]:
    return {cpu: node.id for node in machine.numa_nodes for cpu in node.cpu_ids}


@pytest.mark.parametrize("name", ["xeon", "epyc", "laptop", "graviton"])
@pytest.mark.parametrize("affinity", ["none", "compact", "spread"])
@pytest.mark.parametrize("policy", ["default", "local", "interleave"])
def test_no_worker_straddles_nodes(probe: Probe, name: str, affinity: str, policy: str) -> None:
    machine = probe(name)
    nodes = node_of(machine)
    for workers in range(1, len(machine.cpu_ids) + 1):
        taken = place_workers(plan(affinity, policy=policy), machine, workers)
        assert len(taken) == workers
        for placement in taken:
            assert len({nodes[cpu] for cpu in placement.cpu_ids}) <= 1
            if len(machine.numa_nodes) > 1:
                assert placement.cpu_ids
                assert placement.node == nodes[placement.cpu_ids[0]]
        if affinity != "none":  # A CPU of its own for each.
            assert len({placement.cpu_ids for placement in taken}) == workers


def test_two_sockets_are_filled_one_after_the_other_cores_before_siblings(probe: Probe) -> None:
    machine = probe("xeon")
    taken = place_workers(plan("compact"), machine, 10)
    assert [placement.cpu_ids for placement in taken] == [(cpu,) for cpu in range(10)]
    assert [placement.node for placement in taken] == [0] * 4 + [1] * 4 + [0] * 2
    loose = place_workers(plan(), machine, 6)
    assert [placement.node for placement in loose] == [0, 0, 0, 0, 1, 1]
    assert loose[0].cpu_ids == (0, 1, 2, 3, 8, 9, 10, 11)
    assert default_num_workers(machine) == 8


def test_eight_nodes_take_two_workers_each(probe: Probe) -> None:
    taken = place_workers(plan(), probe("epyc"), 16)
    assert [placement.node for placement in taken] == [node for node in range(8) for _ in range(2)]
    spread = place_workers(plan("spread"), probe("epyc"), 8)
    assert sorted(placement.node for placement in spread if placement.node is not None) == list(
        range(8)
    )


def test_performance_cores_come_before_efficiency_cores_and_siblings_last(probe: Probe) -> None:
    machine = probe("laptop")
    taken = [placement.cpu_ids[0] for placement in place_workers(plan("compact"), machine, 12)]
    assert taken == [0, 2, 4, 6, 8, 9, 10, 11, 1, 3, 5, 7]
    assert default_num_workers(machine) == 8


def test_assigned_nodes_hold_and_start_over(probe: Probe) -> None:
    machine = probe("xeon")
    taken = place_workers(plan("compact", (1, 0), "bind"), machine, 4)
    assert [placement.node for placement in taken] == [1, 0, 1, 0]
    assert [placement.cpu_ids for placement in taken] == [(4,), (0,), (5,), (1,)]
    for placement in taken:
        assert placement.policy is not None
        assert (placement.policy.name, placement.policy.nodes) == ("bind", (placement.node,))
    loose = place_workers(plan("none", (1,)), machine, 2)
    assert [placement.cpu_ids for placement in loose] == [(4, 5, 6, 7, 12, 13, 14, 15)] * 2


def test_interleave_goes_over_all_nodes_or_the_assigned_ones(probe: Probe) -> None:
    machine = probe("epyc")
    for nodes, expected in (((), tuple(range(8))), ((2, 5), (2, 5))):
        for placement in place_workers(plan("none", nodes, "interleave"), machine, 4):
            assert placement.policy is not None
            assert (placement.policy.name, placement.policy.nodes) == ("interleave", expected)


@pytest.mark.parametrize(
    ("values", "workers", "text"),
    [
        (("compact", (9,)), 1, "must name NUMA nodes of this machine; got 9"),
        (("compact", (0,)), 9, "node 0 must have a CPU for each worker assigned to it; got 9"),
        (("4,0", (0, 1)), 2, "node 0 has 0-3,8-11; got CPU 4"),
        (("compact",), 17, "num_workers must be at most the 16 CPUs.*--num-workers 16"),
        (("none", (), "bind"), 2, "policy bind needs NUMA nodes"),
    ],
)
def test_what_cannot_be_placed_is_told(
    probe: Probe, values: tuple[Any, ...], workers: int, text: str
) -> None:
    with pytest.raises(PlanError, match=text):
        place_workers(plan(*values), probe("xeon"), workers)


def test_a_machine_of_which_nothing_is_known(probe: Probe) -> None:
    taken = place_workers(plan(), probe("plain"), 3)
    assert [(placement.cpu_ids, placement.node) for placement in taken] == [((), None)] * 3
    assert [s.cpu_ids for s in place_workers(plan("compact"), probe("plain"), 2)] == [(0,), (1,)]


HERE = Machine.probe()


def policies_work() -> bool:
    try:
        set_memory_policy(get_memory_policy())
    except RunError:
        return False
    return bool(HERE.numa_nodes)


def threads() -> dict[str, Path]:
    """The workers' threads of this process, by name."""
    found = {(p / "comm").read_text().strip(): p for p in Path("/proc/self/task").iterdir()}
    return {name: path for name, path in found.items() if name.startswith("hotloop-w")}


def field(path: Path, name: str) -> str:
    lines = (path / "status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(name + ":"))


def minor_faults(path: Path) -> int:
    return int((path / "stat").read_text().rsplit(") ", 1)[1].split()[7])


WIDTH = 1024


def a_step(settings: Plan, workers: int) -> tuple[ParallelStep, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(32, WIDTH), torch.randint(0, 4, (32,))
    values = {"parallel.num_workers": workers, "parallel.chunk_size": 8}
    step = ParallelStep(model, nn.functional.cross_entropy, optimizer, (x, y),
                        settings.replace(values))  # fmt: skip
    for _ in range(2):
        step(x, y)
    assert step.path == "parallel", step.reason
    return step, (x, y)


@needs_kernels
@pytest.mark.skipif(len(HERE.cpu_ids) < 2, reason="needs two CPUs")
def test_workers_sit_where_they_were_placed_and_the_caller_gets_up_again() -> None:
    before = os.sched_getaffinity(0)
    step, batch = a_step(plan("compact"), 2)
    step(*batch)
    assert field(threads()["hotloop-w1"], "Cpus_allowed_list") == str(step.placements[1].cpu_ids[0])
    assert os.sched_getaffinity(0) == before
    step.close()
    assert not threads()


@needs_kernels
@pytest.mark.skipif(len(HERE.cpu_ids) < 2, reason="needs two CPUs")
def test_worker_processes_sit_where_they_were_placed() -> None:
    processes = plan("compact").replace({"parallel.executor": "processes"})
    step, batch = a_step(processes, 2)
    step(*batch)
    team = step._team
    assert isinstance(team, ProcessTeam)
    allowed = [field(Path(f"/proc/{pid}"), "Cpus_allowed_list") for pid in team.pids()]
    assert allowed == [str(placement.cpu_ids[0]) for placement in step.placements]
    step.close()


@needs_kernels
@pytest.mark.skipif(not policies_work(), reason="the kernel refuses memory policies here")
@pytest.mark.parametrize("policy", ["local", "bind", "interleave"])
def test_policies_of_workers_and_the_same_bits(policy: str) -> None:
    node = HERE.numa_nodes[0].id
    expected, batch = a_step(plan(), 1)
    found = get_memory_policy()
    step, _ = a_step(plan("none", (node,), policy), 2)
    addresses = [p.data_ptr() for p in step.model.parameters()]
    parameters = list(step.model.parameters())
    losses = [(step(*batch).item(), expected(*batch).item()) for _ in range(3)]
    assert all(mine == theirs for mine, theirs in losses)
    # The same objects on other pages, which stay where they are.
    assert all(a is b for a, b in zip(parameters, step.model.parameters(), strict=True))
    moved = [p.data_ptr() for p in parameters]
    assert not set(moved) & set(addresses)
    step(*batch)
    assert [p.data_ptr() for p in parameters] == moved
    first = (threads()["hotloop-w1"] / "numa_maps").read_text().splitlines()[0].split()[1]
    assert first == ("local" if policy == "local" else f"{policy}:{node}")
    assert get_memory_policy() == found
    step.close()
    expected.close()


@needs_kernels
@pytest.mark.skipif(not policies_work(), reason="the kernel refuses memory policies here")
def test_each_worker_touches_first_what_it_updates() -> None:
    """A page belongs to the node of the thread that faults it in: the kernel counts faults."""
    page = resource.getpagesize()
    step, batch = a_step(plan("none", (), "local"), 2)
    step(*batch)
    faults = minor_faults(threads()["hotloop-w1"])  # Since it was started.
    # Half of the weight and of Adam's two averages, each of 4 MiB.
    half = 3 * (4 * WIDTH * WIDTH // 2) // page
    assert half <= faults <= 2 * half + 500
    faults = minor_faults(threads()["hotloop-w1"])
    step(*batch)
    assert minor_faults(threads()["hotloop-w1"]) - faults < half // 4
    step.close()


def test_seated_restores_also_after_an_error() -> None:
    (placement,) = place_workers(plan("compact"), HERE, 1)
    before = os.sched_getaffinity(0)

    def inside() -> None:
        with placed(placement):
            assert os.sched_getaffinity(0) == set(placement.cpu_ids)
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert os.sched_getaffinity(0) == before
