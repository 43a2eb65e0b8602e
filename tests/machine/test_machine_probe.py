"""``Machine.probe`` on captured trees of other machines."""

import json

import pytest

from hotloop.machine import Core, Machine

GIB = 1024**3
CPU = "sys/devices/system/cpu"


def test_two_socket_xeon_with_smt(probe):
    machine = probe("xeon")
    assert (machine.usable_cpus, machine.logical_cpus) == (16, 16)
    assert (machine.physical_cores, machine.sockets, machine.usable_cores) == (8, 2, 8)
    assert machine.cores[0] == Core(cpu_ids=(0, 8), kind=None, node=0, socket=0)
    assert machine.cores[-1] == Core(cpu_ids=(7, 15), kind=None, node=1, socket=1)
    assert machine.cpu_model == "Intel(R) Xeon(R) Platinum 8480+"
    assert machine.isa == (
        "avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni",
        "amx_tile", "amx_bf16", "amx_int8",
    )  # fmt: skip
    assert [node.cpu_ids for node in machine.numa_nodes] == [
        (0, 1, 2, 3, 8, 9, 10, 11),
        (4, 5, 6, 7, 12, 13, 14, 15),
    ]
    assert machine.numa_nodes[1].memory_total_bytes == 128 * GIB
    assert machine.numa_nodes[1].distances == (21, 10)
    assert [c.size_bytes for c in machine.last_level_caches] == [60 * 1024**2] * 2
    data = [c for c in machine.caches if (c.level, c.kind) == (1, "data")]
    assert len(data) == 8
    assert data[0].shared_by == (0, 8)
    assert machine.line_bytes == 64
    assert machine.is_virtual is False


def test_epyc_with_eight_nodes(probe):
    machine = probe("epyc")
    assert (machine.physical_cores, machine.sockets, len(machine.numa_nodes)) == (16, 2, 8)
    assert machine.numa_nodes[3].distances == (32, 32, 32, 10, 32, 32, 32, 32)
    assert [core.node for core in machine.cores] == [n for n in range(8) for _ in range(2)]
    assert len(machine.last_level_caches) == 8
    assert machine.isa == ("avx", "avx2", "fma")
    assert machine.allocator == "tcmalloc"


def test_hybrid_laptop(probe):
    machine = probe("laptop")
    assert (machine.physical_cores, machine.logical_cpus, machine.sockets) == (8, 12, 1)
    kinds = {core.cpu_ids: core.kind for core in machine.cores}
    assert kinds[(0, 1)] == "performance"
    assert kinds[(11,)] == "efficiency"
    assert sorted(kinds.values()) == ["efficiency"] * 4 + ["performance"] * 4
    assert "avx_vnni" in machine.isa


def test_graviton(probe):
    machine = probe("graviton")
    assert machine.architecture == "aarch64"
    assert machine.cpu_model == "Arm Neoverse-V1"
    assert machine.isa == ("neon", "dotprod", "sve", "bf16", "i8mm")
    assert {core.kind for core in machine.cores} == {None}
    assert machine.allocator == "musl"
    assert machine.is_virtual is None
    assert machine.platform == "Amazon EC2 c7g.2xlarge"


def test_arm_big_and_little_cores_by_capacity(probe):
    capacities = [340, 340, 340, 340, 870, 870, 1010, 1024]
    files = {f"{CPU}/cpu{i}/cpu_capacity": str(c) for i, c in enumerate(capacities)}
    kinds = [core.kind for core in probe("graviton", files).cores]
    assert kinds == ["efficiency"] * 4 + ["performance"] * 4


def test_memory_and_huge_pages(probe):
    memory = probe("xeon").memory
    assert (memory.total_bytes, memory.available_bytes) == (256 * GIB, 128 * GIB)
    assert (memory.swap_total_bytes, memory.swap_free_bytes) == (2 * GIB, GIB)
    assert (memory.huge_page_bytes, memory.huge_pages_total, memory.huge_pages_free) == (
        2 * 1024**2, 16, 4,
    )  # fmt: skip
    assert memory.transparent_huge_pages == "madvise"
    assert memory.limit_bytes is None
    assert memory.headroom_bytes == 128 * GIB


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("/usr/lib/x86_64-linux-gnu/libc.so.6", "glibc"),
        ("/lib/libc-2.31.so", "glibc"),
        ("/opt/libjemalloc.so.2\n7f02-7f03 r-xp 0 08:01 9 /lib/libc.so.6", "jemalloc"),
        ("/opt/libmimalloc.so.2.1", "mimalloc"),
        ("/lib/libcrypto.so.3", None),
    ],
)
def test_allocator_from_the_mapped_libraries(probe, library, name):
    files = {"proc/self/maps": f"7f00-7f01 r-xp 0 08:01 7 {library}\n"}
    assert probe("xeon", files).allocator == name


def test_affinity_mask_narrows(probe):
    machine = probe("xeon", {"proc/self/status": "Cpus_allowed_list:\t2-3,10\n"})
    assert machine.cpu_ids == (2, 3, 10)
    assert machine.usable_cpus == 3
    assert machine.usable_cores == 2
    assert machine.logical_cpus == 16


def test_offline_cpus_do_not_count(probe):
    machine = probe("graviton", {f"{CPU}/online": "0-3\n"})
    assert (machine.usable_cpus, machine.logical_cpus, machine.physical_cores) == (4, 4, 4)


def test_siblings_from_cpuinfo_when_sysfs_is_missing(probe):
    block = "processor\t: {}\nphysical id\t: {}\ncore id\t: {}\nmodel name\t: X\nflags\t: lm avx\n"
    places = [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    cpuinfo = "\n".join(block.format(cpu, *place) for cpu, place in enumerate(places))
    machine = probe({"proc/cpuinfo": cpuinfo})
    assert [core.cpu_ids for core in machine.cores] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert (machine.sockets, machine.usable_cpus) == (2, 8)
    assert machine.architecture == "x86_64"


def test_flags_are_those_every_cpu_has(probe):
    cpuinfo = (
        "processor : 0\nmodel name : P\nflags : lm avx2 avx512f\n\n"
        "processor : 1\nmodel name : E\nflags : lm avx2\n"
    )
    machine = probe({"proc/cpuinfo": cpuinfo})
    assert machine.isa == ("avx2",)
    assert machine.cpu_model == "P + E"


def test_unknown_socket_is_none(probe):
    files = {f"{CPU}/cpu{cpu}/topology/physical_package_id": "-1\n" for cpu in range(8)}
    machine = probe("graviton", files)
    assert machine.sockets is None
    assert machine.physical_cores == 8


def test_empty_tree_is_all_unknown(probe):
    machine = probe({})
    assert machine.usable_cpus == 1
    assert machine == Machine()
    assert machine.tee is None
    assert machine.line_bytes is None
    assert machine.usable_cores is None
    assert machine.memory.headroom_bytes is None


def test_root_that_does_not_exist(tmp_path):
    assert Machine.probe(tmp_path / "nowhere") == Machine()


@pytest.mark.parametrize("gone", ["topology", "cache", "node", "cpuinfo", "status", "meminfo"])
def test_a_missing_part_leaves_the_rest(probe, write_tree, gone):
    full = probe("xeon")
    root = write_tree("xeon")
    for path in root.rglob("*"):
        if path.is_file() and gone in str(path.relative_to(root)):
            path.unlink()
    machine = Machine.probe(root)
    assert machine.usable_cpus == 16
    assert machine.allocator == full.allocator
    assert (machine.physical_cores is None) == (gone == "topology")
    assert (machine.caches == ()) == (gone == "cache")
    assert (machine.numa_nodes == ()) == (gone == "node")
    assert (machine.cpu_model is None) == (gone == "cpuinfo")
    assert (machine.memory.total_bytes is None) == (gone == "meminfo")


@pytest.mark.parametrize("junk", [b"", b"\x00\xff\xfe junk", b"-7", b"9" * 40, b"1-99999999999"])
def test_garbage_in_every_file_is_unknown(write_tree, junk):
    root = write_tree("laptop")
    for path in root.rglob("*"):
        if path.is_file():
            path.write_bytes(junk)
    machine = Machine.probe(root)
    assert machine.usable_cpus >= 1
    assert machine.caches == ()
    assert machine.isa == ()
    assert (machine.cpu_model, machine.cpu_quota) == (None, None)
    assert machine.memory.total_bytes is None
    assert machine.memory.transparent_huge_pages is None
    json.dumps(machine.to_dict())


def test_folders_where_files_should_be(tmp_path):
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/self/cgroup", f"{CPU}/online"):
        (tmp_path / name).mkdir(parents=True)
    assert Machine.probe(tmp_path).usable_cpus == 1


@pytest.mark.parametrize("name", ["xeon", "epyc", "laptop", "graviton"])
def test_to_dict_is_json_and_holds_every_field(probe, name):
    machine = probe(name)
    document = machine.to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["fingerprint"] == machine.fingerprint()
    assert document["line_bytes"] == 64
    assert document["memory"]["total_bytes"] == machine.memory.total_bytes
    assert document["cores"][0]["cpu_ids"] == list(machine.cores[0].cpu_ids)


def test_fingerprint_tells_machines_apart_but_not_moments(probe, write_tree):
    prints = {name: probe(name).fingerprint() for name in ("xeon", "epyc", "laptop")}
    assert len(set(prints.values())) == 3
    later = {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable: 1 kB\n"}
    assert probe("laptop", later).fingerprint() == prints["laptop"]
    fewer = {"proc/self/status": "Cpus_allowed_list:\t0-3\n"}
    assert probe("laptop", fewer).fingerprint() != prints["laptop"]
