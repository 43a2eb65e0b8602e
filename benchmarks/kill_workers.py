"""Kill worker processes at random moments until there were enough, and compare every run's bits.

python benchmarks/kill_workers.py [--kills 2500] [--out benchmarks/results/kill-workers.json]
"""

import argparse
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hotloop
from hotloop.parallel import ParallelStep
from hotloop.parallel.processes import ProcessTeam

BATCH, CHUNK, STEPS, WORKERS = 64, 8, 100, 2


def run(executor: str, kills: int, seed: int) -> dict[str, Any]:
    """Train, killing a random worker at random moments until ``kills``; losses, weights, counts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    ).train()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH, 1, 8, 8, generator=draw)
    y = torch.randint(0, 10, (STEPS * BATCH,), generator=draw)
    knobs = {"num_workers": WORKERS, "chunk_size": CHUNK, "executor": executor}
    knobs["max_restarts"] = 10**6
    plan = hotloop.Plan().replace({f"parallel.{name}": value for name, value in knobs.items()})
    loss_fn = nn.functional.cross_entropy
    step = ParallelStep(model, loss_fn, optimizer, (x[:BATCH], y[:BATCH]), plan)
    killed, stop = 0, threading.Event()

    def kill() -> None:
        nonlocal killed
        moments = random.Random(seed)
        while not stop.is_set() and killed < kills:
            time.sleep(moments.uniform(0.0, 0.03))
            team = step._team
            pids = team.pids() if isinstance(team, ProcessTeam) else []
            if pids:
                try:
                    os.kill(moments.choice(pids), signal.SIGKILL)
                    killed += 1
                except ProcessLookupError:
                    pass

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        losses = [
            step(x[at : at + BATCH], y[at : at + BATCH]).item() for at in range(0, len(x), BATCH)
        ]
    finally:
        stop.set()
        killer.join()
    restarts = step._team.restarts if isinstance(step._team, ProcessTeam) else 0
    chunks = sum(worker.chunks for worker in step.workers)
    step.close()
    return {
        "losses": losses, "weights": model.state_dict(), "killed": killed, "restarts": restarts,
        "chunks": chunks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    expected = run("threads", 0, 0)
    started = time.monotonic()
    killed = restarts = runs = different = lost = 0
    while killed < options.kills:
        found = run("processes", options.kills - killed, runs)
        killed, restarts, runs = killed + found["killed"], restarts + found["restarts"], runs + 1
        same = found["losses"] == expected["losses"] and all(
            torch.equal(found["weights"][n], t) for n, t in expected["weights"].items()
        )
        different += not same
        lost += abs(found["chunks"] - STEPS * BATCH // CHUNK)
        print(f"{killed} killed in {runs} runs, {different} runs with other bits", flush=True)
    document = {
        "killed": killed, "restarts": restarts, "runs": runs, "steps_per_run": STEPS,
        "runs_with_other_bits": different, "chunks_lost_or_counted_twice": lost,
        "wall_s": round(time.monotonic() - started, 1), "torch": str(torch.__version__),
    }  # fmt: skip
    print(json.dumps(document, indent=1))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    raise SystemExit(1 if different or lost else 0)


if __name__ == "__main__":
    main()
