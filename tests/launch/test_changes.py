"""What is changed on which machine: decided from machines made by hand."""

import pytest

from hotloop.errors import PlanError
from hotloop.launch.changes import NAMES, Options, decide
from hotloop.launch.settings import Settings
from hotloop.machine import Core, Machine, MachineMemory, NumaNode, ThreadAffinity
from hotloop.units import GIB, MIB


def machine(
    cpus=8, threads_per_core=1, quota=None, nodes=1, free_bytes=64 * GIB, allocator="glibc"
):
    """A machine of one socket; each node has an equal share of the CPUs."""
    size = cpus // nodes
    cores = tuple(
        Core(
            cpu_ids=tuple(range(first, first + threads_per_core)),
            socket=0,
            node=first // size,
            kind=None,
        )
        for first in range(0, cpus, threads_per_core)
    )
    usable = cpus if quota is None else max(1, int(quota))
    return Machine(
        usable_cpus=min(cpus, usable), cpu_ids=tuple(range(cpus)), cpu_quota=quota, cores=cores,
        numa_nodes=tuple(
            NumaNode(
                id=i, cpu_ids=tuple(range(i * size, (i + 1) * size)), memory_total_bytes=GIB,
                distances=(),
            )
            for i in range(nodes)
        ),
        memory=MachineMemory(available_bytes=free_bytes, transparent_huge_pages="madvise"),
        allocator=allocator,
    )  # fmt: skip


def made(which, environ=None, **options):
    settings, changes = decide(
        which, Options(**options), environ or {}, Settings(pid=1, prefix="/usr")
    )
    return settings, {change.name: change for change in changes}


def test_every_change_has_a_name_and_can_be_left_out():
    settings, changes = made(machine(quota=1.5), off=NAMES)
    assert tuple(changes) == NAMES
    assert not any(change.made for change in changes.values())
    assert not settings.matmul
    assert not settings.optimizer
    assert (settings.environment, settings.mallopt, settings.cpu_ids) == ({}, {}, ())


@pytest.mark.parametrize(
    ("which", "threads"),
    [
        (machine(16, quota=1.5), "1"),
        (machine(16, quota=4), "4"),
        (machine(16, threads_per_core=2), "8"),
        (machine(16, threads_per_core=2, quota=12), "8"),
    ],
)
def test_threads_are_cores_within_the_quota(which, threads):
    settings, changes = made(which)
    assert settings.environment["OMP_NUM_THREADS"] == threads
    assert settings.environment_before == {"OMP_NUM_THREADS": None}
    assert changes["threads"].environment == settings.environment


def test_where_torch_is_right_nothing_is_set():
    settings, changes = made(machine(8))
    assert settings.environment == {}
    assert not changes["threads"].made
    assert not changes["affinity"].made


def test_what_the_user_set_stays():
    environ = {"OMP_NUM_THREADS": "3", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    settings, changes = made(machine(16, quota=2), environ)
    assert settings.environment == {}
    assert "yours" in changes["threads"].text
    assert settings.mallopt == {}
    # But an option is newer than a variable.
    settings, _ = made(machine(16, quota=2), environ, num_threads=5)
    assert settings.environment["OMP_NUM_THREADS"] == "5"
    assert settings.environment_before["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_have_disjoint_cores_and_share_the_budget(ranks):
    settings, _ = made(machine(8), num_ranks=ranks)
    parts = settings.cpu_ids
    assert len(parts) == ranks
    assert sorted(cpu for part in parts for cpu in part) == list(range(8))
    assert settings.environment["OMP_NUM_THREADS"] == str(max(1, 8 // ranks))


def test_ranks_on_nodes_take_their_memory():
    settings, _ = made(machine(8, nodes=2), num_ranks=2, numa_policy="bind")
    assert settings.cpu_ids == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert settings.numa_nodes == ((0,), (1,))
    settings, _ = made(machine(8, nodes=2), numa_policy="interleave")
    assert settings.numa_nodes == ((0, 1),)
    assert "interleave" in made(machine(8, nodes=2))[1]["numa"].text


@pytest.mark.parametrize(
    "options",
    [
        {"num_ranks": 9},
        {"num_ranks": 0},
        {"num_threads": 0},
        {"off": ("speed",)},
        {"numa_policy": "near"},
        {"numa_policy": "bind", "numa_nodes": (3,)},
        {"affinity": ThreadAffinity.parse("77")},
    ],
)
def test_bad_options(options):
    with pytest.raises(PlanError):
        made(machine(8), **options)


def test_affinity_confines_and_threads_follow():
    settings, _ = made(machine(8), affinity=ThreadAffinity.parse("2,4"))
    assert settings.cpu_ids == ((2, 4),)
    assert settings.environment["OMP_NUM_THREADS"] == "2"
    settings, _ = made(machine(8, quota=3), affinity=ThreadAffinity.parse("compact"))
    assert settings.cpu_ids == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("which", "kept"),
    [
        (machine(free_bytes=64 * GIB), GIB),
        (machine(free_bytes=4 * GIB), 512 * MIB),
        (machine(free_bytes=3 * GIB), 256 * MIB),
        (machine(free_bytes=256 * MIB), None),
        (machine(allocator="jemalloc"), None),
        (machine(allocator=None), None),
    ],
)
def test_the_allocator_keeps_at_most_an_eighth_of_what_is_free(which, kept):
    settings, changes = made(which)
    if kept is None:
        assert settings.mallopt == {}
        assert not changes["allocator"].made
    elif changes["allocator"].made:  # This process has glibc.
        assert settings.mallopt["-1"] == settings.mallopt["-3"] == kept
        assert changes["allocator"].environment["MALLOC_TRIM_THRESHOLD_"] == str(kept)


def test_huge_pages_are_asked_for_only():
    assert made(machine())[0].environment == {}
    assert made(machine(), huge_pages=True)[0].environment == {"THP_MEM_ALLOC_ENABLE": "1"}
    assert not made(machine(), huge_pages=True, off=("huge-pages",))[1]["huge-pages"].made


def test_settings_travel_as_text():
    settings, _ = made(machine(8, nodes=2), num_ranks=2, numa_policy="bind")
    assert Settings.loads(settings.dumps()) == settings
