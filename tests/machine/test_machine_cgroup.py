"""Limits of control groups: v1, v2 and hybrid, nested, and as containers show them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.machine import Machine

GIB = 1024**3
MIB = 1024**2
NO_LIMIT_V1 = str(0x7FFFFFFFFFFFF000)
ROOT = "sys/fs/cgroup"

MOUNTS_V2 = {
    "proc/self/mountinfo": (
        "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
}


def mounts_v1(subtree: str = "/") -> dict[str, str]:
    lines = [
        f"{40 + i} 30 0:{27 + i} {subtree} /{ROOT}/{name} rw shared:{i} - cgroup cgroup rw,{name}"
        for i, name in enumerate(("cpu,cpuacct", "cpuset", "memory"))
    ]
    return {"proc/self/mountinfo": "\n".join(lines) + "\n"}


def group_v1(path: str) -> dict[str, str]:
    controllers = ("cpu,cpuacct", "cpuset", "memory", "name=systemd")
    return {"proc/self/cgroup": "".join(f"{i}:{c}:{path}\n" for i, c in enumerate(controllers, 1))}


def group_v2(path: str) -> dict[str, str]:
    return {"proc/self/cgroup": f"0::{path}\n"}


def quota_v1(folder: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {
        f"{ROOT}/cpu,cpuacct{folder}/cpu.cfs_quota_us": f"{quota_us}\n",
        f"{ROOT}/cpu,cpuacct{folder}/cpu.cfs_period_us": f"{period_us}\n",
    }


@pytest.mark.parametrize(("quota", "usable"), [(1.5, 1), (0.5, 1), (3.0, 3), (2.99, 2), (64.0, 8)])
def test_container_quota_v2(probe, quota, usable):
    files = {f"{ROOT}/cpu.max": f"{int(quota * 100_000)} 100000\n"}
    machine = probe("plain", MOUNTS_V2, group_v2("/"), files)
    assert machine.cpu_quota == pytest.approx(quota)
    assert machine.usable_cpus == usable
    assert machine.cpu_ids == tuple(range(8))


@pytest.mark.parametrize(("quota", "usable"), [(1.5, 1), (0.5, 1), (3.0, 3), (2.99, 2), (64.0, 8)])
def test_container_quota_v1(probe, quota, usable):
    # Without a cgroup namespace: the mount shows the container's group as its root.
    files = quota_v1("", int(quota * 50_000), 50_000)
    machine = probe("plain", mounts_v1("/docker/abc"), group_v1("/docker/abc"), files)
    assert machine.cpu_quota == pytest.approx(quota)
    assert machine.usable_cpus == usable


@pytest.mark.parametrize("content", ["max 100000\n", "", "junk\n", "100000\n", "5 0\n", "-1 100\n"])
def test_no_quota_v2(probe, content):
    machine = probe("plain", MOUNTS_V2, group_v2("/"), {f"{ROOT}/cpu.max": content})
    assert machine.cpu_quota is None
    assert machine.usable_cpus == 8


def test_no_quota_v1_is_minus_one(probe):
    machine = probe("plain", mounts_v1(), group_v1("/"), quota_v1("", -1))
    assert machine.cpu_quota is None


def test_nested_v2_takes_the_tightest_ancestor(probe):
    files = {
        f"{ROOT}/a/cpu.max": "200000 100000\n",
        f"{ROOT}/a/b/cpu.max": "600000 100000\n",
        f"{ROOT}/a/b/c/cpu.max": "max 100000\n",
        f"{ROOT}/a/memory.max": f"{8 * GIB}\n",
        f"{ROOT}/a/b/memory.max": f"{2 * GIB}\n",
        f"{ROOT}/a/b/memory.current": f"{GIB}\n",
        f"{ROOT}/a/b/memory.stat": f"anon 5\ninactive_file {256 * MIB}\n",
        f"{ROOT}/a/b/c/memory.max": "max\n",
    }
    machine = probe("plain", MOUNTS_V2, group_v2("/a/b/c"), files)
    assert (machine.cpu_quota, machine.usable_cpus) == (2.0, 2)
    assert machine.memory.limit_bytes == 2 * GIB
    assert machine.memory.limit_used_bytes == 768 * MIB
    assert machine.memory.headroom_bytes == 2 * GIB - 768 * MIB


def test_nested_v1_takes_the_tightest_ancestor(probe):
    files = {
        **quota_v1("/k8s", 250_000),
        **quota_v1("/k8s/pod", -1),
        f"{ROOT}/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{ROOT}/memory/k8s/memory.limit_in_bytes": f"{4 * GIB}\n",
        f"{ROOT}/memory/k8s/memory.usage_in_bytes": f"{GIB}\n",
        f"{ROOT}/memory/k8s/pod/memory.limit_in_bytes": NO_LIMIT_V1,
    }
    machine = probe("plain", mounts_v1(), group_v1("/k8s/pod"), files)
    assert (machine.cpu_quota, machine.usable_cpus) == (2.5, 2)
    assert machine.memory.limit_bytes == 4 * GIB
    assert machine.memory.limit_used_bytes == GIB


def test_siblings_and_children_of_the_group_do_not_limit(probe):
    files = {
        f"{ROOT}/a/cpu.max": "400000 100000\n",
        f"{ROOT}/a/child/cpu.max": "100000 100000\n",
        f"{ROOT}/other/cpu.max": "100000 100000\n",
    }
    assert probe("plain", MOUNTS_V2, group_v2("/a"), files).cpu_quota == 4.0


@pytest.mark.parametrize("path", ["/docker/0123", "/../sibling", "relative", "/a//../../x"])
def test_group_that_the_mount_does_not_show(probe, path):
    files = {f"{ROOT}/cpu.max": "150000 100000\n", f"{ROOT}/memory.max": f"{GIB}\n"}
    machine = probe("plain", MOUNTS_V2, group_v2(path), files)
    assert machine.cpu_quota == 1.5
    assert machine.memory.limit_bytes == GIB


def test_mount_of_another_subtree_falls_back_to_its_root(probe):
    files = quota_v1("", 150_000)
    machine = probe("plain", mounts_v1("/docker/abc"), group_v1("/docker/abcdef"), files)
    assert machine.cpu_quota == 1.5


def test_unlimited_v1_memory_is_none(probe):
    files = {
        f"{ROOT}/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{ROOT}/memory/memory.stat": f"cache 1\nhierarchical_memory_limit {2**60}\n",
    }
    machine = probe("plain", mounts_v1(), group_v1("/"), files)
    assert machine.memory.limit_bytes is None
    assert machine.memory.headroom_bytes == machine.memory.available_bytes


def test_v1_limit_of_an_ancestor_outside_the_container(probe):
    files = {
        f"{ROOT}/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{ROOT}/memory/memory.stat": f"cache 1\nhierarchical_memory_limit {3 * GIB}\n",
    }
    machine = probe("plain", mounts_v1(), group_v1("/"), files)
    assert machine.memory.limit_bytes == 3 * GIB


def test_hybrid_reads_each_controller_where_it_lives(probe):
    mounts = mounts_v1()["proc/self/mountinfo"] + (
        f"60 30 0:36 / /{ROOT}/unified rw - cgroup2 cgroup2 rw\n"
    )
    files = {
        "proc/self/mountinfo": mounts,
        "proc/self/cgroup": group_v1("/job")["proc/self/cgroup"] + "0::/job\n",
        **quota_v1("/job", 300_000),
        f"{ROOT}/unified/job/memory.max": f"{GIB}\n",
        f"{ROOT}/unified/job/cgroup.procs": "1\n",
    }
    machine = probe("plain", files)
    assert machine.cpu_quota == 3.0
    assert machine.memory.limit_bytes == GIB


def test_cpuset_that_excludes_cpu_0_v2(probe):
    files = {
        f"{ROOT}/job/cpuset.cpus.effective": "1-3,9\n",
        f"{ROOT}/job/cpuset.cpus": "0-15\n",
    }
    machine = probe("xeon", MOUNTS_V2, group_v2("/job"), files)
    assert machine.cpu_ids == (1, 2, 3, 9)
    assert machine.usable_cpus == 4
    assert machine.usable_cores == 3


def test_cpuset_that_excludes_cpu_0_v1(probe):
    files = {
        f"{ROOT}/cpuset/cpuset.cpus": "0-15\n",
        f"{ROOT}/cpuset/job/cpuset.cpus": "4-7\n",
    }
    machine = probe("xeon", mounts_v1(), group_v1("/job"), files)
    assert machine.cpu_ids == (4, 5, 6, 7)


def test_empty_cpuset_means_as_the_parent(probe):
    files = {
        f"{ROOT}/a/cpuset.cpus": "2-5\n",
        f"{ROOT}/a/b/cpuset.cpus": "\n",
    }
    assert probe("xeon", MOUNTS_V2, group_v2("/a/b"), files).cpu_ids == (2, 3, 4, 5)


def test_mask_cpuset_and_quota_together(probe):
    files = {
        "proc/self/status": "Cpus_allowed_list:\t0-5\n",
        f"{ROOT}/cpuset.cpus.effective": "4-11\n",
        f"{ROOT}/cpu.max": "180000 100000\n",
    }
    machine = probe("xeon", MOUNTS_V2, group_v2("/"), files)
    assert machine.cpu_ids == (4, 5)
    assert machine.usable_cpus == 1


def test_mask_wins_over_a_cpuset_that_contradicts_it(probe):
    files = {
        "proc/self/status": "Cpus_allowed_list:\t0-1\n",
        f"{ROOT}/cpuset.cpus.effective": "8-9\n",
    }
    assert probe("xeon", MOUNTS_V2, group_v2("/"), files).cpu_ids == (0, 1)


def test_mount_points_with_escaped_blanks(probe):
    mounts = r"30 22 0:26 / /mnt/my\040groups rw - cgroup2 cgroup2 rw"
    files = {"proc/self/mountinfo": mounts, "mnt/my groups/cpu.max": "100000 100000\n"}
    assert probe("plain", files, group_v2("/")).cpu_quota == 1.0


@given(
    mounts=st.text(st.sampled_from("/ .-\\0147acgroup2\n"), max_size=80),
    point=st.text(st.sampled_from("/.a\\012"), max_size=8),
    subtree=st.text(st.sampled_from("/.a"), max_size=8),
    path=st.text(st.sampled_from("/.:a\n"), max_size=12),
)
def test_no_mountinfo_makes_it_fail_or_hang(tmp_path_factory, mounts, point, subtree, path):
    root = tmp_path_factory.mktemp("groups")
    (root / "proc/self").mkdir(parents=True)
    line = f"1 2 3:4 {subtree} {point} rw - cgroup2 cgroup2 rw\n"
    (root / "proc/self/mountinfo").write_text(line + mounts)
    (root / "proc/self/cgroup").write_text(f"0::{path}\n")
    assert Machine.probe(root).cpu_quota is None
