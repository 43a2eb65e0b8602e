"""Seven kinds of model: hotloop's step beside eager PyTorch tuned by hand, interleaved.

    python benchmarks/seven_models.py [--models small,gru] [--rounds 7] [--out FILE]

Tuned by hand: batches in memory, fused Adam, adjacent channels for convolutions, gradients set to
None. Each side runs in a process of its own, 64 samples a step, all processors; a slice of each in
turn, after 3 that are not counted. The losses of both are compared, step by step.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from about import about
from models import build
from torch import nn

import hotloop
from hotloop.files import write_text_atomically
from hotloop.machine import Machine
from hotloop.train.child import Child

MODELS = ("small", "big", "cnn", "residual", "transformer", "gru", "autoencoder")
BATCH, BATCHES, SLICE_S, COMPARED = 64, 20, 1.5, 100


def batches(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images with a signal: each class has a prototype."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 1, 28, 28, generator=generator)
    made = []
    for _ in range(BATCHES):
        labels = torch.randint(0, 10, (BATCH,), generator=generator)
        x = prototypes[labels] + 0.3 * torch.randn(BATCH, 1, 28, 28, generator=generator)
        made.append((x, x if name == "autoencoder" else labels))
    return made


def eager(model: nn.Module, loss_fn: Any, data: Any, name: str) -> Callable[[int], torch.Tensor]:
    if name in ("cnn", "residual"):
        model.to(memory_format=torch.channels_last)
        data[:] = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(number: int) -> torch.Tensor:
        x, y = data[number % BATCHES]
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def fast(model: nn.Module, loss_fn: Any, data: Any, name: str) -> Callable[[int], torch.Tensor]:
    plan = hotloop.Plan().replace({"step.compile": "always"})
    plan = plan.resolve(Machine.probe(), None)
    optimizer = torch.optim.Adam(model.parameters())
    step = hotloop.compile_step(model, loss_fn, optimizer, data[0], plan)
    return lambda number: step(*data[number % BATCHES])


def child(name: str, kind: str) -> None:
    """Answers ``{}`` with the losses of its first steps, ``{"s": ...}`` with steps per second."""
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loss_fn = nn.functional.mse_loss if name == "autoencoder" else nn.functional.cross_entropy
    make = fast if kind == "hotloop" else eager
    step, done = make(build(name).train(), loss_fn, batches(name), name), 0
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked:
            losses = [float(step(number)) for number in range(COMPARED)]
            answer: dict[str, Any] = {"losses": losses}
        else:
            started = time.perf_counter()
            while time.perf_counter() - started < asked["s"]:
                for _ in range(5):
                    step(done)
                    done += 1
            answer = {"took_s": time.perf_counter() - started, "done": done}
        print(json.dumps(answer), flush=True)


def race(name: str, rounds: int) -> dict[str, Any]:
    sides = {
        kind: Child(f"{name} {kind}", "seven_models", ["child", name, kind])
        for kind in ("hotloop", "eager")
    }
    try:
        losses, rates = {}, {kind: [] for kind in sides}
        for kind, side in sides.items():
            side.tell()
            losses[kind] = side.answer(400)["losses"]
        before = dict.fromkeys(sides, 0)
        for number in range(rounds + 3):
            for kind, side in sides.items():
                side.tell(s=SLICE_S)
                answer = side.answer(100)
                if number >= 3:
                    rates[kind].append((answer["done"] - before[kind]) / answer["took_s"])
                before[kind] = answer["done"]
    finally:
        for side in sides.values():
            side.close()
    ratios = [a / b for a, b in zip(rates["hotloop"], rates["eager"], strict=True)]
    return {
        "samples_per_s": {k: round(BATCH * statistics.median(r), 1) for k, r in rates.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3), "max": round(max(ratios), 3), "n": rounds,
        },
        "greatest_relative_loss_difference": max(
            abs(a - b) / max(abs(b), 1e-3)
            for a, b in zip(losses["hotloop"], losses["eager"], strict=True)
        ),
        "last_loss": losses["eager"][-1],
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:4])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {}
    if args.out is not None and args.out.is_file():
        document = json.loads(args.out.read_text())
    document["about"] = {
        **about(), "batch_size": BATCH, "optimizer": "Adam", "compared_steps": COMPARED,
    }  # fmt: skip
    for name in args.models.split(","):
        row = document.setdefault("models", {})[name] = race(name, args.rounds)
        print(name, json.dumps(row), flush=True)
        if args.out is not None:
            write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
