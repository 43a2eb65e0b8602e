"""Plans: rules, files, flags."""

import argparse
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.errors import PlanError, StorageError
from hotloop.machine import Ceilings, Machine, MachineMemory, MatmulCeiling, Measurement
from hotloop.plan import (
    CheckpointConfig,
    CpuConfig,
    MemoryConfig,
    NumaConfig,
    Plan,
    add_plan_flags,
    flags,
    plan_from_flags,
)  # fmt: skip

FLAGS = {
    "--num-threads": "cpu.num_threads",
    "--thread-affinity": "cpu.thread_affinity",
    "--queue-size": "cpu.queue_size",
    "--numa-nodes": "numa.node_assignments",
    "--numa-policy": "numa.allocation_policy",
    "--memory-limit": "memory.limit_bytes",
    "--micro-batch-size": "memory.micro_batch_size",
    "--tensor-arena": "memory.tensor_arena",
    "--huge-pages": "memory.huge_pages",
    "--mmap-above": "memory.mmap_above_bytes",
    "--line-bytes": "memory.line_bytes",
    "--enclave-overhead": "memory.enclave_overhead_bytes",
    "--checkpoint-every-steps": "checkpoint.every_steps",
    "--checkpoint-every-s": "checkpoint.every_s",
    "--keep-last": "checkpoint.keep_last",
    "--compile": "step.compile",
    "--precision": "step.precision",
    "--num-workers": "parallel.num_workers",
    "--chunk-size": "parallel.chunk_size",
    "--executor": "parallel.executor",
    "--max-restarts": "parallel.max_restarts",
    "--steal-threshold": "parallel.steal_threshold",
    "--hang-s": "parallel.hang_s",
    "--host-shares": "parallel.host_shares",
    "--host-timeout-s": "parallel.host_timeout_s",
}

counts = st.integers(1, 10**6)
plans = st.builds(
    Plan,
    cpu=st.builds(
        CpuConfig,
        num_threads=counts | st.just("auto"),
        thread_affinity=st.sampled_from(["none", "compact", "spread", "0,2,4-6"]),
        queue_size=counts,
    ),
    numa=st.builds(
        NumaConfig,
        node_assignments=st.lists(st.integers(0, 63), max_size=8).map(tuple),
        allocation_policy=st.sampled_from(["default", "local", "bind", "interleave"]),
    ),
    memory=st.builds(
        MemoryConfig,
        limit_bytes=st.none() | counts,
        micro_batch_size=st.none() | counts,
        tensor_arena=st.sampled_from(["try", "never"]),
        huge_pages=st.sampled_from(["never", "try", "require"]),
        mmap_above_bytes=counts,
        line_bytes=st.none() | st.sampled_from([32, 64, 128]),
        enclave_overhead_bytes=st.none() | counts,
    ),
    checkpoint=st.builds(
        CheckpointConfig,
        every_steps=st.none() | counts,
        every_s=st.floats(0, 1e6),
        keep_last=counts,
    ),
)


@given(plan=plans)
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_a_plan_comes_back_from_its_file(tmp_path_factory, suffix, plan):
    path = tmp_path_factory.mktemp("plan") / f"hotloop{suffix}"
    plan.save(path)
    assert Plan.load(path) == plan


def test_the_flags_are_these():
    assert {flag: name for flag, name, _ in flags()} == FLAGS


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    return plan_from_flags(parser.parse_args(argv))


def test_flags_win_over_the_file(tmp_path):
    path = Plan().replace({"cpu.num_threads": 3, "cpu.queue_size": 9}).save(tmp_path / "p.toml")
    plan = parse("--plan", str(path), "--num-threads", "5", "--memory-limit", "2GiB")
    assert (plan.cpu.num_threads, plan.cpu.queue_size) == (5, 9)
    assert plan.memory.limit_bytes == 2 * 2**30
    assert parse().cpu.num_threads == "auto"
    assert parse("--plan", "default") == Plan()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: CpuConfig(num_threads=0), "num_threads must be a whole number of at least 1"),
        (lambda: CpuConfig(num_threads=True), "num_threads"),
        (lambda: CpuConfig(num_threads="2"), "num_threads"),
        (lambda: CpuConfig(thread_affinity="sideways"), "sideways"),
        (lambda: CpuConfig(queue_size=0), "queue_size"),
        (lambda: NumaConfig(node_assignments=(-1,)), "node_assignments"),
        (lambda: NumaConfig(allocation_policy="lokal"), "use 'local'"),
        (lambda: MemoryConfig(limit_bytes=0), "limit_bytes"),
        (lambda: MemoryConfig(micro_batch_size=1.5), "micro_batch_size"),
        (lambda: MemoryConfig(huge_pages="sometimes"), "huge_pages must be one of"),
        (lambda: MemoryConfig(line_bytes=48), "power of two"),
        (lambda: MemoryConfig(mmap_above_bytes=-1), "mmap_above_bytes"),
        (lambda: CheckpointConfig(every_s=float("nan")), "every_s"),
        (lambda: CheckpointConfig(every_steps=0), "every_steps"),
        (lambda: CheckpointConfig(keep_last=0), "keep_last"),
        (lambda: Plan(cpu=3), "cpu must be a CpuConfig"),
        (lambda: Plan.from_dict({"cpu": {"num_thread": 2}}), "did you mean 'num_threads'"),
        (lambda: Plan.from_dict({"cpus": {}}), "did you mean 'cpu'"),
        (lambda: Plan.from_dict({"cpu": 4}), "must be a table"),
        (lambda: Plan.load("no-such-plan.toml"), "readable text"),
        (lambda: parse("--queue-size", "many"), "--queue-size"),
        (lambda: parse("--memory-limit", "much"), "--memory-limit"),
    ],
)
def test_what_breaks_a_rule_is_refused_in_one_line(make, rule):
    with pytest.raises(PlanError) as caught:
        make()
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"), [("p.toml", "cpu = ["), ("p.json", "{"), ("q.json", "[]")]
)
def test_a_broken_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError, match=name):
        Plan.load(tmp_path / name)


def test_a_plan_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        Plan().save(tmp_path / "file" / "plan.toml")


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().cpu = CpuConfig()


def test_the_default_leaves_one_cpu_free():
    assert CpuConfig().num_threads == max(1, Machine.probe().usable_cpus - 1)


def ceilings(**rates):
    matmul = tuple(
        MatmulCeiling("float32", "mkl", "torch.mm", int(n[1:]), 8, Measurement(r, r, r, 1))
        for n, r in rates.items()
    )
    return Ceilings(matmul, (), "x", None, 0.0, 0.0)


def test_auto_is_resolved_by_measurement():
    machine = Machine(usable_cpus=8, cpu_ids=tuple(range(8)))
    assert Plan.auto().resolve(machine).cpu.num_threads == 8
    assert Plan.auto().resolve(machine, ceilings(t1=10.0, t4=30.0, t8=20.0)).cpu.num_threads == 4
    assert Plan.auto().resolve(machine, ceilings(t4=29.0, t8=30.0)).cpu.num_threads == 4
    assert Plan().replace({"cpu.num_threads": 3}).resolve(machine).cpu.num_threads == 3


def test_enclave_overhead_and_limit_come_from_the_machine():
    memory = MachineMemory(total_bytes=100, limit_bytes=60)
    inside = Machine(tee="sgx", memory=memory)
    assert Plan().resolve(inside).memory.enclave_overhead_bytes == 256 * 2**20
    assert Plan().resolve(Machine(tee="none")).memory.enclave_overhead_bytes == 0
    assert Plan().memory_limit_bytes(inside) == 60
    assert Plan().replace({"memory.limit_bytes": 50}).memory_limit_bytes(inside) == 50


def test_configure_affinity_restores_what_it_found():
    import os

    before = os.sched_getaffinity(0)
    with NumaConfig(node_assignments=(0,), allocation_policy="local").configure_affinity():
        assert os.sched_getaffinity(0) <= before
    assert os.sched_getaffinity(0) == before
