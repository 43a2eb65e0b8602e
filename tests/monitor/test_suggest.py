"""Each rule on a report made by hand: it speaks where it must and is silent where it must."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.monitor import (
    HotSpot,
    Optimization,
    OtherProcess,
    PerformanceReport,
    ThreadUse,
    WorkerUse,
    suggest,
)
from hotloop.monitor.rules import RULES
from hotloop.plan import Plan
from support import monitor_reports as reports

report, machine, GIB = reports.report, reports.machine, reports.GIB


def names(a_report, a_machine=None):
    return [item.name for item in suggest(a_report, a_machine or machine())]


def first(a_report, a_machine=None):
    return suggest(a_report, a_machine or machine())[0]


def pinned(count, cpu_ids):
    return tuple(
        ThreadUse(thread=n, name="w", user_s=5.0, system_s=0.0, run_delay_s=4.0, cpu_ids=cpu_ids)
        for n in range(count)
    )


def workers(*rates, **each):
    return tuple(
        WorkerUse(worker=n, chunks=int(rate * 8), busy_s=8.0, rate_per_s=rate, cpu=n, **each)
        for n, rate in enumerate(rates)
    )


HOG = OtherProcess(process=77, name="hog", cpu_s=5.0, cpu=1)
SPOT = HotSpot(phase="data_wait", function="augment", file="/a/train.py", line=7, share=0.9)
WORKERS = {"parallel.num_workers": 4, "parallel.chunk_size": 16}

# Name of the suggestion, what differs from the healthy report, the machine, and its change.
CASES = [
    (
        "quota",
        report(16, cpu={"periods": 100, "throttled_periods": 90, "throttled_s": 6.0,
                        "cpu_quota": 1.5, "usable_cpus": 1}),
        machine(2, quota=1.5),
        {"cpu.num_threads": 2},
    ),
    (
        "oversubscription",
        report(16, cpu={"usable_cpus": 4, "run_delay_s": 400.0}),
        machine(),
        {"cpu.num_threads": 4},
    ),
    (
        "affinity",
        report(cpu={"run_delay_s": 16.0, "threads": pinned(4, (0,))}),
        machine(),
        {"cpu.thread_affinity": "spread"},
    ),
    (
        "noisy-neighbour",
        report(cpu={"others_s": 5.0, "run_delay_s": 2.0, "others": (HOG,)}),
        machine(),
        "renice -n 19 -p 77",
    ),
    ("steal", report(cpu={"steal_s": 4.0}), machine(), "move to a host"),
    (
        "throttling",
        report(cpu={"frequency_hz": 1.8e9, "max_frequency_hz": 3.6e9}),
        machine(),
        "cpupower frequency-set",
    ),
    ("smt", report(), machine(cores=2), {"cpu.num_threads": 2}),
    (
        "idle-cpus",
        report(cpu={"cpu_fraction": 0.25}, work={"num_threads": 1}),
        machine(),
        {"cpu.num_threads": 4},
    ),
    (
        "migrations",
        report(cpu={"migrations": 5000}),
        machine(),
        {"cpu.thread_affinity": "compact"},
    ),
    (
        "swap",
        report(memory={"swap_in_bytes": GIB, "major_faults": 30_000, "pressure_some": 0.6}),
        machine(),
        {"memory.micro_batch_size": 16},
    ),
    (
        "memory-limit",
        report(memory={"peak_resident_bytes": 15 * GIB}),
        machine(),
        {"memory.micro_batch_size": 16},
    ),
    (
        "memory-limit",
        report(memory={"peak_resident_bytes": 15 * GIB}, work={"queue_bytes": 8 * GIB}),
        machine(),
        {"cpu.queue_size": 4},
    ),
    (
        "page-faults",
        report(cpu={"system_s": 12.0}, memory={"minor_faults": 9_000_000},
               knobs={"memory.tensor_arena": "never"}),
        machine(),
        {"memory.tensor_arena": "try"},
    ),
    (
        "page-faults",
        report(cpu={"system_s": 12.0}, memory={"minor_faults": 9_000_000}, plan=False),
        machine(),
        "MALLOC_TRIM_THRESHOLD_=",
    ),
    ("huge-pages", report(work={"step_bytes": GIB}), machine(), {"memory.huge_pages": "try"}),
    (
        "numa",
        report(memory={"numa_local_share": 0.5}),
        dataclasses.replace(machine(8, nodes=2), cpu_ids=(0, 1, 2, 3), usable_cpus=4),
        {"numa.node_assignments": [0], "numa.allocation_policy": "bind"},
    ),
    (
        "loader-workers",
        report(plan=False, cpu={"child_processes": 16}, step={"data_wait_s": 6.0}),
        machine(),
        "num_workers=0",
    ),
    (
        "python-transform",
        report(plan=False, step={"data_wait_s": 6.0}, hot_spots=(SPOT,)),
        machine(),
        "make augment work on a whole batch",
    ),
    ("data-bound", report(plan=False, step={"data_wait_s": 6.0}), machine(), "num_workers=3"),
    (
        "queue-size",
        report(work={"queue_bytes": GIB}, knobs={"cpu.queue_size": 256}),
        machine(),
        {"cpu.queue_size": 4},
    ),
    (
        "queue-size",
        report(step={"data_wait_s": 2.0}, knobs={"cpu.queue_size": 1}),
        machine(),
        {"cpu.queue_size": 8},
    ),
    (
        "slow-worker",
        report(workers=workers(100.0, 100.0, 100.0, 50.0), knobs=WORKERS),
        machine(),
        {"parallel.chunk_size": 4, "parallel.steal_threshold": 1},
    ),
    (
        "slow-worker",
        report(workers=workers(100.0, 50.0, 100.0, 100.0), knobs=WORKERS,
               cpu={"others_s": 5.0, "run_delay_s": 4.0, "others": (HOG,)}),
        machine(),
        "renice -n 19 -p 77",
    ),
    (
        # Measured: chunks run at full speed, and in between another has the CPU of worker 1.
        "slow-worker",
        report(workers=(
                   WorkerUse(worker=0, chunks=4133, busy_s=0.41, wait_s=0.86, update_s=0.35, cpu=0),
                   WorkerUse(worker=1, chunks=3867, busy_s=0.44, wait_s=0.0, update_s=0.45, cpu=1),
               ), knobs={"parallel.num_workers": 2, "parallel.chunk_size": 32},
               cpu={"others_s": 2.6, "run_delay_s": 3.3, "others": (HOG,)}),
        machine(),
        "renice -n 19 -p 77",
    ),
    (
        "steal-threshold",
        report(workers=workers(*[100.0] * 4, wait_s=4.0),
               knobs={"parallel.num_workers": 4, "parallel.steal_threshold": 50}),
        machine(),
        {"parallel.steal_threshold": 1},
    ),
    (
        "workers-wait",
        report(workers=workers(*[100.0] * 4, wait_s=4.0), knobs={"parallel.num_workers": 4}),
        machine(),
        {"parallel.num_workers": None, "cpu.num_threads": 4},
    ),
    (
        "workers-wait",
        report(workers=workers(*[100.0] * 4, wait_s=4.0), knobs=WORKERS),
        machine(),
        {"parallel.chunk_size": 4},
    ),
    ("workers", report(work={"has_convolutions": True}), machine(), {"parallel.num_workers": 4}),
    (
        "checkpoints",
        report(step={"checkpoint_s": 20.0, "checkpoints": 20},
               knobs={"checkpoint.every_steps": 1}),
        machine(),
        {"checkpoint.every_steps": None, "checkpoint.every_s": 100.0},
    ),
    (
        "batch-size",
        report(work={"batch_size": 4, "flop_per_step": 1e6}),
        machine(),
        "batch_size=64",
    ),
    (
        "memory-layout",
        report(plan=False, work={"has_convolutions": True, "memory_format": "contiguous"}),
        machine(),
        "torch.channels_last",
    ),
    (
        "compile",
        report(work={"path": "plain", "flop_per_step": None}, knobs={"step.compile": "off"}),
        machine(),
        {"step.compile": "auto"},
    ),
    (
        "slow-kernels",
        report(plan=False, work={"path": None, "flop_per_step": 2e8}),
        machine(),
        "hotloop run",
    ),
    (
        "precision",
        report(work={"ceiling_bfloat16_flop_per_s": 8e11}),
        machine(isa=("avx512_bf16",)),
        {"step.precision": "auto"},
    ),
    (
        "steps-per-call",
        report(step={"compute_s": 0.2, "data_wait_s": 0.01},
               knobs={"checkpoint.every_steps": 1}),
        machine(),
        {"checkpoint.every_steps": None},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "seen", "where", "change"), CASES, ids=lambda v: str(v)[:30])
def test_a_rule_names_the_problem_and_the_change(name, seen, where, change):
    found = first(seen, where)
    assert found.name == name
    assert found.state == "hypothesis"
    assert found.proof is None
    if isinstance(change, dict):
        assert found.change.plan == change
        Plan().replace(change)  # Every knob exists and takes the value.
    else:
        assert change in found.change.command


def test_every_rule_has_a_case():
    spoken = {rule for rule in RULES for _, seen, where, _ in CASES
              if rule(reports_facts(seen, where)) is not None}  # fmt: skip
    assert {rule.__name__ for rule in RULES} == {rule.__name__ for rule in spoken}


def reports_facts(seen, where):
    from hotloop.monitor.rules import Facts

    return Facts(seen, where)


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize("cpus", [1, 2, 4, 64])
def test_a_healthy_run_has_nothing_to_suggest(plan, cpus):
    assert names(report(cpus, plan=plan), machine(cpus)) == []


def test_problems_come_before_opportunities_and_larger_gains_first():
    seen = report(
        cpu={"steal_s": 4.0, "others_s": 5.0, "run_delay_s": 2.0, "others": (HOG,)},
        work={"has_convolutions": True, "step_bytes": GIB},
        memory={"peak_resident_bytes": 15 * GIB},
    )
    found = suggest(seen, machine())
    kinds = [item.kind for item in found]
    assert kinds == sorted(kinds, reverse=True)
    assert found[0].name == "memory-limit"
    gains = [item.expected_gain or 0.0 for item in found if item.kind == "problem"][1:]
    assert gains == sorted(gains, reverse=True)
    assert {"noisy-neighbour", "steal", "workers", "huge-pages"} <= {item.name for item in found}


def test_a_neighbour_that_nobody_waits_for_is_none():
    cpu = {"others_s": 5.0, "run_delay_s": 0.1, "others": (HOG,)}
    assert names(report(cpu=cpu)) == []


def test_checkpoints_at_the_ends_of_epochs_are_not_held_against_the_plan():
    step = {"checkpoint_s": 2.0, "checkpoints": 20}
    assert names(report(step=step, knobs={"checkpoint.every_s": 0})) == []
    assert names(report(step=step, knobs={"checkpoint.every_s": 5.0})) == ["checkpoints"]


def test_one_cause_is_named_not_its_consequences():
    # 16 threads in a quota of 1.5 wait for CPUs as well; the quota is why.
    quota = {"periods": 100, "throttled_periods": 90, "throttled_s": 6.0, "cpu_quota": 1.5,
             "usable_cpus": 1, "run_delay_s": 300.0}  # fmt: skip
    assert names(report(16, cpu=quota), machine(2, quota=1.5)) == ["quota"]
    # A loader's processes leave threads waiting, and the step for data.
    cpu = {"child_processes": 16, "run_delay_s": 20.0, "others_s": 2.0}
    seen = report(plan=False, cpu=cpu, step={"data_wait_s": 6.0})
    assert names(seen) == ["loader-workers"]
    seen = report(plan=False, step={"data_wait_s": 6.0}, hot_spots=(SPOT,))
    assert names(seen) == ["python-transform"]


def test_what_changes_the_mathematics_says_so():
    inexact = {name for name, seen, where, _ in CASES if not first(seen, where).exact}
    assert inexact == {"batch-size", "precision"}


def test_every_threshold_and_gain_has_a_source():
    for _, seen, where, _ in CASES:
        for found in suggest(seen, where):
            assert len(found.evidence.threshold_source) > 10
            assert found.expected_gain is None or found.gain_source != "not known"
            assert found.evidence.value is not None


def test_a_suggestion_survives_json():
    for _, seen, where, _ in CASES:
        found = first(seen, where)
        assert Optimization.from_dict(json.loads(json.dumps(found.to_dict()))) == found
        assert PerformanceReport.from_dict(json.loads(json.dumps(seen.to_dict()))) == seen


_FIGURES = st.none() | st.floats(0, 1e3) | st.just(0)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rules_stand_whatever_is_unknown(data):
    seen = report(
        cpu={
            name: data.draw(_FIGURES)
            for name in ("run_delay_s", "others_s", "steal_s", "migrations", "cpu_fraction",
                         "periods", "throttled_periods", "throttled_s", "frequency_hz",
                         "max_frequency_hz", "busy_threads", "child_processes")
        },
        memory={
            name: data.draw(_FIGURES)
            for name in ("minor_faults", "major_faults", "swap_in_bytes", "limit_bytes",
                         "numa_local_share", "peak_resident_bytes", "huge_page_share")
        },
        step={"steps": data.draw(st.integers(0, 3)), "calls": data.draw(st.integers(0, 3)),
              "compute_s": data.draw(st.floats(0, 1)), "checkpoint_s": data.draw(st.floats(0, 9)),
              "checkpoints": data.draw(st.none() | st.integers(0, 9))},
        work={
            name: data.draw(st.none() | st.integers(1, 100))
            for name in ("batch_size", "num_threads", "flop_per_step", "queue_bytes",
                         "ceiling_flop_per_s", "ceiling_bfloat16_flop_per_s")
        },
        plan=data.draw(st.booleans()),
        duration_s=data.draw(st.floats(0, 10)),
    )  # fmt: skip
    for item in suggest(seen, machine(data.draw(st.integers(1, 8)))):
        assert item.change.plan is not None or item.change.command
        assert item.expected_gain is None or item.expected_gain >= 0
