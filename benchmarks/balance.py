"""Two workers, and other programs on the core of one of them: what balancing and stealing save.

Each round times, interleaved: worker 0 alone on its core, worker 1 alone on its core beside the
other programs, and both together: equal parts without stealing, equal parts with stealing, balanced
parts without stealing, and both. Own rates are what a worker alone trains, update included.

python benchmarks/balance.py [--model cnn] [--rounds 5] [--out benchmarks/results/balance.json]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from about import about

import hotloop
from hotloop.parallel import BatchSizeAdjuster, ParallelStep
from hotloop.parallel.simulate import simulate_step
from hotloop.train.zoo import build_model

BATCH, CHUNK, STEPS = 512, 16, 4
NEVER = 10**6
KINDS = {
    "equal": {"balanced": False, "threshold": NEVER},
    "stealing": {"balanced": False, "threshold": 1},
    "balanced": {"balanced": True, "threshold": NEVER},
    "both": {"balanced": True, "threshold": 1},
}


def made(model: str, cpus: list[int], *, balanced: bool = True, threshold: int = 1) -> ParallelStep:
    torch.manual_seed(0)
    network = build_model(model).train()
    optimizer = torch.optim.Adam(network.parameters())
    x, y = batch()
    values = {
        "parallel.num_workers": len(cpus),
        "parallel.chunk_size": CHUNK,
        "parallel.steal_threshold": threshold,
        "cpu.thread_affinity": ",".join(map(str, cpus)),
    }
    step = ParallelStep(network, torch.nn.functional.cross_entropy, optimizer, (x, y),
                        hotloop.Plan().replace(values))  # fmt: skip
    assert step.path == "parallel", step.reason
    if not balanced:
        step.balancer.adjuster = BatchSizeAdjuster(least_gain=2.0)  # Nothing gains as much.
    return step


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(BATCH, 1, 28, 28, generator=draw), torch.randint(
        0, 10, (BATCH,), generator=draw
    )


def rate(step: ParallelStep, steps: int = STEPS) -> float:
    x, y = batch()
    began_s = time.perf_counter()
    for _ in range(steps):
        step(x, y)
    return steps * BATCH / (time.perf_counter() - began_s)


class Neighbours:
    """Other programs that compute on one CPU."""

    def __init__(self, cpu: int, count: int) -> None:
        code = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
        self.programs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
        time.sleep(0.3)

    def __enter__(self) -> "Neighbours":
        return self

    def __exit__(self, *error: object) -> None:
        for program in self.programs:
            program.kill()
            program.wait()


def measured(model: str, cpus: list[int], neighbours: int, rounds: int) -> dict[str, Any]:
    alone = [made(model, [cpu]) for cpu in cpus]
    teams = {name: made(model, cpus, **options) for name, options in KINDS.items()}
    rates: dict[str, list[float]] = {name: [] for name in ("worker_0", "worker_1", *KINDS)}
    with Neighbours(cpus[1], neighbours):
        for step in (*alone, *teams.values()):
            rate(step, 20)  # Shares settle; what is compared is what they settle at.
        for _ in range(rounds):
            for name, step in zip(rates, (*alone, *teams.values()), strict=True):
                rates[name].append(rate(step))
        workers = [
            {"queue": w.queue, "chunks": w.chunks, "stolen": w.stolen, "lost": w.lost,
             "slowdown": w.slowdown, "cpu_share": w.cpu_share}
            for w in teams["both"].workers
        ]  # fmt: skip
    for step in (*alone, *teams.values()):
        step.close()
    own = [a + b for a, b in zip(rates["worker_0"], rates["worker_1"], strict=True)]
    return {
        "neighbours": neighbours,
        "samples_per_s": {name: spread(values) for name, values in rates.items()},
        "sum_of_own_rates": spread(own),
        # Of each round, since the machine is not the same from round to round.
        "share_of_sum": {
            name: spread([rate / best for rate, best in zip(rates[name], own, strict=True)], 3)
            for name in KINDS
        },
        "workers": workers,
    }


def settling(model: str, cpus: list[int]) -> dict[str, Any]:
    """Chunks of worker 1 after each step; a neighbour comes after 20 steps and goes after 60."""
    step, (x, y) = made(model, cpus), batch()
    history = []
    for begin, neighbours in ((0, 0), (20, 1), (60, 0)):
        with Neighbours(cpus[1], neighbours):
            for _ in range(20 if begin == 0 else 40):
                step(x, y)
                history.append(step.balancer.workers[1].queue)
    step.close()
    found = {"chunks_of_worker_1": history, "of": BATCH // CHUNK}
    for name, begin, end in (("neighbour_comes", 20, 60), ("neighbour_goes", 60, 100)):
        part = history[begin:end]
        last = statistics.median(part[-10:])
        outside = [n for n, queue in enumerate(part) if abs(queue - last) > 2]
        changes = sum(a != b for a, b in itertools.pairwise(part[20:]))
        found[name] = {
            "steps_until_within_2_chunks": outside[-1] + 1 if outside else 0,
            "settled_at": last,
            "changes_in_the_20_steps_after": changes,
        }
    return found


def simulated() -> dict[str, Any]:
    """Eight workers of speeds 1:2:4, 128 chunks."""
    speeds = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0]
    adjuster = BatchSizeAdjuster()
    equal, fair = adjuster.shares(128, [1.0] * 8), adjuster.shares(128, speeds)
    cases = {
        "equal": (equal, None), "stealing": (equal, 1), "balanced": (fair, None), "both": (fair, 1),
    }  # fmt: skip
    return {
        name: 128 / simulate_step(speeds, queues, steal_threshold=threshold).wall_s / sum(speeds)
        for name, (queues, threshold) in cases.items()
    }


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits), "min": round(min(values), digits),
        "max": round(max(values), digits), "n": len(values),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))[:2]
    document = {
        "model": options.model, "batch_size": BATCH, "chunk_size": CHUNK, "cpus": cpus,
        "with_neighbours": [measured(options.model, cpus, n, options.rounds) for n in (0, 1, 2)],
        "settling": settling(options.model, cpus),
        "simulated_share_of_sum_8_workers_1_2_4": simulated(),
        **about(),
    }  # fmt: skip
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
