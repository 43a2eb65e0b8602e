"""Reports made by hand: as ``hotloop train`` writes them, and with all that a monitor adds."""

from __future__ import annotations

import json
import math
from typing import Any

from hotloop.monitor.metrics import (
    CacheLevel,
    CacheStats,
    CoreUse,
    CpuStats,
    MemoryStats,
    PerformanceReport,
    Sample,
    StepTimes,
    ThreadUse,
    WorkerUse,
)
from hotloop.monitor.optimization import Change, Evidence, Optimization, Proof

MIB = 2**20
_FLOP_PER_S = {"float32": 429e9, "bfloat16": 855e9}


def _measured(rate: float) -> dict[str, float]:
    return {"median": rate, "min": 0.97 * rate, "max": 1.02 * rate, "n": 9}


def machine(*, sockets: int = 1, cores: int = 2, smt: int = 1) -> dict[str, Any]:
    """As ``Machine.to_dict`` with ``ceilings``; one NUMA node and one L3 a socket."""
    count = sockets * cores
    ids = [[core + count * sibling for sibling in range(smt)] for core in range(count)]
    of_socket = [
        [cpu for core in ids[s * cores : (s + 1) * cores] for cpu in core] for s in range(sockets)
    ]
    private = ((1, "data", 48 * 1024), (1, "instruction", 32 * 1024), (2, "unified", MIB))
    caches = [
        {"level": level, "kind": kind, "size_bytes": size, "line_bytes": 64, "shared_by": core}
        for level, kind, size in private
        for core in ids
    ]
    caches += [
        {"level": 3, "kind": "unified", "size_bytes": 32 * MIB, "line_bytes": 64, "shared_by": cpus}
        for cpus in of_socket
    ]
    return {
        "fingerprint": "1500db188c4f135b",
        "cpu_model": "AMD EPYC 9R45",
        "usable_cpus": count * smt,
        "logical_cpus": count * smt,
        "cpu_ids": sorted(cpu for core in ids for cpu in core),
        "cpu_quota": None,
        "cores": [
            {"cpu_ids": core, "kind": None, "node": at // cores, "socket": at // cores}
            for at, core in enumerate(ids)
        ],
        "numa_nodes": [
            {"id": s, "cpu_ids": cpus, "memory_total_bytes": 64 * 2**30, "distances": []}
            for s, cpus in enumerate(of_socket)
        ],
        "caches": caches,
        "isa": ["avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni"],
        "memory": {"total_bytes": sockets * 64 * 2**30, "limit_bytes": None},
        "allocator": "glibc",
        "tee": "none",
        "kernel": "6.12.1",
        "accelerators": [],
        "ceilings": {
            "matmul": [
                {"dtype": dtype, "library": "onednn", "route": "torch.mm", "num_threads": threads,
                 "size": 2048, "flop_per_s": _measured(rate * threads / 2)}
                for dtype, rate in _FLOP_PER_S.items()
                for threads in (1, 2)
            ],
            "bandwidth": [
                {"kind": "triad", "num_threads": threads, "array_bytes": 128 * MIB,
                 "bytes_per_s": _measured(37.3e9 * threads)}
                for threads in (1, 2)
            ],
        },
    }  # fmt: skip


_BACKWARD, _IMAGE = "convolution backward", "[64, 32, 26, 26]"
# Kind, shape, count, kernel, seconds, FLOP and bytes of one.
_OPERATIONS = (
    (_BACKWARD, f"{_IMAGE} by [64, 32, 3, 3]", 1, "onednn", 8.1e-3, 2.72e9, 2.06e7),
    ("convolution", "[64, 32, 26, 26] by [64, 32, 3, 3]", 1, "onednn", 2.85e-3, 1.36e9, 1.5e7),
    (_BACKWARD, "[64, 1, 28, 28] by [32, 1, 3, 3]", 1, "onednn", 665e-6, 2.49e7, 5.74e6),
    ("product and update", "128 x 64 x 9216", 1, "hotloop", 607e-6, 1.51e8, 3.07e7),
    ("product", "64 x 9216 x 128 nt", 1, "onednn", 455e-6, 1.51e8, 7.1e6),
    ("product", "64 x 128 x 9216 nn", 1, "onednn", 398e-6, 1.51e8, 7.1e6),
    ("convolution", "[64, 1, 28, 28] by [32, 1, 3, 3]", 1, "onednn", 215e-6, 2.49e7, 5.74e6),
    ("product", "64 x 10 x 128 nn", 1, "hotloop", 1.74e-6, 1.64e5, 4.04e4),
)  # fmt: skip


def report() -> dict[str, Any]:
    """A run without a monitor's figures, as older reports are."""
    step_s = 17.1e-3
    curve = [(n, 2.3 * math.exp(-n / 60) + 0.12 + 0.06 * math.sin(n * 1.7)) for n in range(1, 257)]
    sizes = {
        "model_parameters_bytes": 4_799_528, "batch_data_bytes": 12_723_456,
        "gradient_buffers_bytes": 4_799_528, "optimizer_state_bytes": 9_599_072,
        "working_memory_bytes": 50_500_000, "runtime_base_bytes": 348_000_000,
        "enclave_overhead_bytes": 0,
    }  # fmt: skip
    total = sum(sizes.values())
    return {
        "format": 1,
        "model": "DigitNet",
        "parameters": 1_199_882,
        "data": "MNIST train: 4,096 real digits",
        "batch_size": 64,
        "steps": 256,
        "epochs": 4,
        "stopped": "epochs done",
        "train_loss": 0.1342,
        "validation_loss": 0.1571,
        "validation_accuracy": 0.9531,
        "history": [
            {"epoch": e, "steps": 64 * (e + 1), "train_loss": 0.9 / (e + 1),
             "validation_loss": 0.5 / (e + 1) + 0.03, "validation_accuracy": 0.97 - 0.12 / (e + 1),
             "learning_rate": 1e-3, "train_s": 1.1, "samples_per_s": 3723.0 + 20 * e}
            for e in range(4)
        ],
        "curve": [list(point) for point in curve],
        "samples_per_s": 3743.0,
        "train_s": 4.38,
        "wall_s": 9.02,
        "time_s": {"prepare": 0.39, "data_wait": 0.012, "step": 4.37, "evaluate": 3.9,
                   "checkpoint": 0.083},
        "flop_per_sample": 71.7e6,
        "share_of_ceiling": 0.6256,
        "ceiling_flop_per_s": 429e9,
        "budget": {"phase": "train", "batch_size": 64, "micro_batch_size": 64, **sizes,
                   "flop_per_step": 4_588_000_000, "output_shape": [64, 10], "assumptions": [],
                   "total_bytes": total},
        "peak_resident_bytes": 447_000_000,
        "prediction_error": total / 447e6 - 1,
        "arena": {"peak_top_bytes": 46_200_000, "capacity_bytes": 101_106_040_832},
        "path": "compiled",
        "path_reason": "forward, loss, backward and update are one compiled graph",
        "precision": "float32",
        "operations": [
            {"kind": kind, "shape": shape, "count": count, "kernel": kernel, "s": seconds,
             "flop": flop, "modelled_bytes": size, "flop_per_s": flop / seconds,
             "share_of_ceiling": flop / seconds / 429e9, "time_share": count * seconds / step_s,
             "candidates_s": {kernel: seconds}}
            for kind, shape, count, kernel, seconds, flop, size in _OPERATIONS
        ],
        "plan": {
            "cpu": {"num_threads": 2, "thread_affinity": "compact", "queue_size": 4},
            "numa": {"node_assignments": [], "allocation_policy": "default"},
            "memory": {"limit_bytes": None, "tensor_arena": "try", "huge_pages": "never"},
            "checkpoint": {"every_steps": 8, "every_s": 60.0, "keep_last": 3},
            "step": {"compile": "auto", "precision": "float32"},
            "parallel": {"num_workers": None, "executor": "threads"},
        },
        "machine": machine(),
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
        "checkpoint": "runs/digits/checkpoints/step-000000256",
        "notes": ["the last batch of each epoch is smaller and takes the plain path"],
    }  # fmt: skip


def performance() -> PerformanceReport:
    """What a monitor saw of that run."""
    return PerformanceReport(
        duration_s=9.02,
        cpu=CpuStats(
            user_s=15.1, system_s=0.82, cpu_fraction=0.883, usable_cpus=2,
            cores=(CoreUse(cpu=0, user=0.88, system=0.04, steal=0.01, own=0.85),
                   CoreUse(cpu=1, user=0.86, system=0.05, steal=0.03, own=0.71)),
            threads=(ThreadUse(thread=4100, name="python", user_s=8.0, system_s=0.41,
                               run_delay_s=0.02, cpu=0, cpu_ids=(0, 1)),
                     ThreadUse(thread=4107, name="python", user_s=6.9, system_s=0.39,
                               run_delay_s=0.31, cpu=1, cpu_ids=(0, 1))),
            busy_threads=2, run_delay_s=0.33, others_s=1.3, steal_s=0.36,
            voluntary_switches=1_204, involuntary_switches=377, migrations=12,
        ),
        memory=MemoryStats(
            resident_bytes=431_000_000, peak_resident_bytes=447_000_000, minor_faults=118_240,
            major_faults=3, huge_page_share=0.0, numa_local_share=1.0, pool_hits=256,
            pool_misses=0, pool_buffers=6, pool_high_water=5, limit_bytes=137_438_953_472,
            available_bytes=129_000_000_000, swap_bytes=0,
        ),
        cache=CacheStats(
            source="modelled", reason="the kernel offers no hardware counters here",
            levels=(CacheLevel(level=1, size_bytes=48 * 1024, shared_by_cpus=1,
                               working_set_bytes=36_900_000, fits=False),
                    CacheLevel(level=2, size_bytes=MIB, shared_by_cpus=1,
                               working_set_bytes=36_900_000, fits=False),
                    CacheLevel(level=3, size_bytes=32 * MIB, shared_by_cpus=2,
                               working_set_bytes=69_800_000, fits=False)),
        ),
        step=StepTimes(
            data_wait_s=0.012, compute_s=4.37, checkpoint_s=0.083, other_s=4.29, steps=256,
            calls=64, samples=16_384, samples_per_s=3743.0, median_call_s=0.0681,
            slowest_call_s=0.0912, checkpoints=32,
        ),
        samples=tuple(
            Sample(t_s=0.2 * n, resident_bytes=int(447e6 - 120e6 * math.exp(-n / 4)),
                   cpu_fraction=0.9 - 0.2 * (n % 11 == 0),
                   samples_per_s=3743.0 * (1 + 0.03 * math.sin(n)))
            for n in range(46)
        ),
        sampling_s=0.021,
        notes=("frequency: the kernel of a virtual machine does not tell",),
    )  # fmt: skip


def workers() -> tuple[WorkerUse, ...]:
    """Two workers, the second on a core that is shared with somebody."""
    return (
        WorkerUse(worker=0, chunks=140, stolen=12, busy_s=4.1, wait_s=0.08, update_s=0.2,
                  rate_per_s=34.1, slowdown=0.98, cpu=0),
        WorkerUse(worker=1, chunks=116, stolen=0, busy_s=3.9, wait_s=0.29, update_s=0.19,
                  rate_per_s=29.7, slowdown=0.81, cpu=1),
    )  # fmt: skip


def optimizations() -> list[Optimization]:
    """One proven, one that is only thought of, one that made it slower."""
    return [
        Optimization(
            name="precision", title="The products run at half the rate bfloat16 would allow",
            evidence=Evidence(
                metric="work.precision", value="float32", threshold="bfloat16",
                threshold_source="hotloop machine --ceilings on this machine",
                text="Matrix products of this machine run 1.99 times as fast in bfloat16.",
            ),
            change=Change(plan={"step.precision": "auto"}),
            exact=False, expected_gain=0.4, gain_source="benchmarks/results/train-cnn-auto.json",
        ),
        Optimization(
            name="checkpoints", title="A checkpoint every 8 steps is too often",
            evidence=Evidence(
                metric="step.checkpoint_s", value=0.083, threshold=0.01,
                threshold_source="1 % of the run, docs/monitor.md",
                text="32 checkpoints took 83 ms, while a step takes 17 ms.",
            ),
            change=Change(plan={"checkpoint.every_steps": None}, command="hotloop train mnist"),
            expected_gain=0.02, gain_source="the time they took", state="proven",
            proof=Proof(median_ratio=1.021, low=1.014, high=1.029, confidence=0.95, n=18,
                        numerics="losses equal to the last bit"),
        ),
        Optimization(
            name="huge-pages", title="No memory lies in huge pages",
            evidence=Evidence(
                metric="memory.huge_page_share", value=0.0, threshold=0.5,
                threshold_source="benchmarks/results/huge-pages.json",
            ),
            change=Change(plan={"memory.huge_pages": "try"}),
            expected_gain=0.01, gain_source="a run like it", state="regression",
            proof=Proof(median_ratio=0.968, low=0.951, high=0.983, confidence=0.95, n=12,
                        numerics="losses equal to 1.2e-7"),
        ),
    ]  # fmt: skip


def full_report() -> dict[str, Any]:
    """The run with everything; plain JSON types, as read from a file."""
    seen = {**performance().to_dict(), "workers": [w.to_dict() for w in workers()]}
    found = [o.to_dict() for o in optimizations()]
    used = {"model_parameters_bytes": 4_799_528, "batch_data_bytes": 12_723_456,
            "optimizer_state_bytes": 9_599_072}  # fmt: skip
    document = {**report(), "performance": seen, "optimizations": found, "used_bytes": used}
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain
