"""Page faults and time of a plain training step, with the tensor arena and without, in turn.

python benchmarks/arena_faults.py [--json FILE] [--models cnn,...] [--batch 64] [--rounds 10]

With PYTHONPATH at another checkout it measures that one.
"""

import argparse
import contextlib
import json
import resource
import statistics
import time
from pathlib import Path

import torch
from models import build

from hotloop.memory import TensorArena

STEPS = 10


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(name: str, batch_size: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = build(name)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x, y = torch.randn(batch_size, 1, 28, 28), torch.randint(0, 10, (batch_size,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    found: dict[str, list[tuple[float, float]]] = {"arena": [], "system": []}
    for _ in range(rounds):
        for kind, taken in found.items():
            with TensorArena() if kind == "arena" else contextlib.nullcontext():
                for _ in range(3):
                    step()
                start, before = time.perf_counter(), faults()
                for _ in range(STEPS):
                    step()
                seconds = time.perf_counter() - start
                taken.append((1e3 * seconds / STEPS, (faults() - before) / STEPS))
                # Gradients of one kind's memory would live on into the other's turn.
                optimizer.zero_grad()
    row: dict[str, object] = {"model": name, "batch_size": batch_size, "rounds": rounds}
    for kind, taken in found.items():
        times, counts = zip(*taken, strict=True)
        row[f"{kind}_step_ms"] = [min(times), statistics.median(times), max(times)]
        row[f"{kind}_faults_per_step"] = statistics.median(counts)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default="small,cnn,residual")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        rows.append(measure(name, args.batch, args.rounds))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        document = {"torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
