"""The guide's GPU tables: an epoch at batch 256, and inference at batch 1, 32 and 64.

    python benchmarks/gpu.py [--rounds 5] [--only train|infer] [--out gpu.json]

All contenders in one process on one device, in turn, round by round. Training is on data of MNIST's
shape (real MNIST, repeated, where HOTLOOP_DATA names it). ``hotloop`` is a whole ``Trainer.fit``
with data in host memory; its peers: PyTorch as people write it (a DataLoader), and two loops with
the data on the GPU and the fused Adam, eager and through ``torch.compile``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from about import about
from torch import nn

import hotloop
from hotloop.bench.models import build_race_model
from hotloop.bench.shapes import SAMPLE_SHAPES
from hotloop.bench.turns import summary
from hotloop.data import open_dataset
from hotloop.train.zoo import build_model

BATCH = 256
EPOCHS = 3
# The guide's own figures: seconds an epoch, samples a second.
GUIDE_EPOCH_S = {10_000: 8.0, 50_000: 35.0, 100_000: 68.0}
GUIDE_PER_S = {1: 450.0, 32: 12_000.0, 64: 22_000.0}
TURN_S = 0.08
Epochs = Callable[[], list[float]]


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    folder = os.environ.get("HOTLOOP_DATA")
    if folder is None:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(count, 1, 28, 28, generator=draw)
        return x, torch.randint(0, 10, (count,), generator=draw)
    dataset = open_dataset(folder, seed=0)
    places = torch.arange(count) % dataset.num_samples
    x, y = dataset.example()
    x, y = torch.empty(count, *x.shape[1:]), torch.empty(count, dtype=y.dtype)
    dataset.gather(places, x, y, epoch=0, training=False)
    return x, y


def with_hotloop(name: str, x: torch.Tensor, y: torch.Tensor, compile: str) -> Epochs:
    plan = hotloop.Plan.from_dict({"step": {"compile": compile}})

    def epochs() -> list[float]:
        model = build_model(name).cuda()
        optimizer = torch.optim.Adam(model.parameters())
        trainer = hotloop.Trainer(model, nn.functional.cross_entropy, optimizer, plan=plan)
        report = trainer.fit((x, y), batch_size=BATCH, epochs=EPOCHS, monitor=False)
        assert report.path == "compiled", report.path_reason
        return [epoch.train_s for epoch in report.history]

    return epochs


def as_written(name: str, x: torch.Tensor, y: torch.Tensor) -> Epochs:
    def epochs() -> list[float]:
        model = build_model(name).cuda()
        optimizer = torch.optim.Adam(model.parameters())
        data = torch.utils.data.TensorDataset(x, y)
        loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, pin_memory=True)

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for a, b in loader:
                yield a.cuda(non_blocking=True), b.cuda(non_blocking=True)

        return timed(batches, model, optimizer)

    return epochs


def resident(name: str, x: torch.Tensor, y: torch.Tensor, compiled: bool) -> Epochs:
    """Data on the GPU: no host in the loop but for launching."""
    x, y = x.cuda(), y.cuda()
    model = build_model(name).cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    forward = torch.compile(model, mode="reduce-overhead") if compiled else model

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(x), device="cuda")
        for begin in range(0, len(x) - BATCH + 1, BATCH):
            places = order[begin : begin + BATCH]
            yield x[places], y[places]

    return lambda: timed(batches, forward, optimizer)


def timed(
    batches: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]],
    forward: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """Seconds of each epoch of a loop as people write it."""
    taken = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for x, y in batches():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def train_row(name: str, count: int, rounds: int) -> dict[str, Any]:
    x, y = samples(count)
    runs = {
        "hotloop": with_hotloop(name, x, y, "auto"),
        "hotloop, compile always": with_hotloop(name, x, y, "always"),
        "pytorch": as_written(name, x, y),
        "pytorch, data on the GPU": resident(name, x, y, False),
        "torch.compile, data on the GPU": resident(name, x, y, True),
    }
    taken: dict[str, list[float]] = {peer: [] for peer in runs}
    memory: dict[str, int] = {}
    for peer, run in runs.items():
        if peer != "pytorch":
            run()  # Compiles, captures.
    for number in range(rounds):
        for peer, run in runs.items():
            if peer == "pytorch" and number >= 2:
                continue  # Slow, and far behind.
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            taken[peer] += run()[1:]  # The first epoch captures.
            memory[peer] = torch.cuda.max_memory_allocated() - before
    row = {
        "model": name,
        "num_samples": count,
        "batch_size": BATCH,
        "guide_s": GUIDE_EPOCH_S[count],
    }
    row["peers"] = {
        peer: {"epoch_s": summary(values), "new_gpu_bytes": memory[peer]}
        for peer, values in taken.items()
    }
    mine = row["peers"]["hotloop"]["epoch_s"]["median"]
    told = ", ".join(
        f"{peer} {values['epoch_s']['median'] / mine:.2f}x as long"
        for peer, values in row["peers"].items()
        if peer != "hotloop"
    )
    print(f"{name} {count}: {mine * 1e3:.1f} ms an epoch; {told}", flush=True)
    return row


def infer_row(name: str, batch: int, rounds: int, max_error: float | None) -> dict[str, Any]:
    torch._dynamo.reset()
    model = build_race_model(name).cuda()
    x = torch.randn(batch, *SAMPLE_SHAPES[name], device="cuda")
    runner = hotloop.compile_inference(
        model, x, batch_sizes=[batch], max_error=max_error, samples=None if max_error is None else x
    )
    with torch.inference_mode():
        expected = model(x)
        calls: dict[str, Callable[[], Any]] = {
            "hotloop": lambda: runner(x),
            "eager": lambda: model(x),
        }
        script = torch.jit.freeze(torch.jit.trace(model, x))
        calls["torchscript"] = lambda: script(x)
        inductor = torch.compile(model, dynamic=False)
        calls["torch.compile"] = lambda: inductor(x)
        reduced = torch.compile(model, mode="reduce-overhead", dynamic=False)

        def marked() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return reduced(x)

        calls["torch.compile, reduce-overhead"] = marked
        rates: dict[str, list[float]] = {peer: [] for peer in calls}
        errors = {}
        for peer, call in calls.items():
            for _ in range(5):
                got = call()
            errors[peer] = float((got - expected).abs().max() / expected.abs().max())
        for number in range(rounds):
            order = list(calls.items())
            order = order[number % len(order) :] + order[: number % len(order)]
            for peer, call in order:
                rates[peer].append(batch * rate(call))
    row: dict[str, Any] = {"model": name, "batch_size": batch, "guide_per_s": GUIDE_PER_S[batch]}
    row["max_error"] = max_error
    row["setting"] = runner.engine.name
    row["precision"] = runner.engine.precision
    row["peers"] = {
        peer: {"samples_per_s": summary(values), "error": errors[peer]}
        for peer, values in rates.items()
    }
    row["race"] = runner.report.to_dict()["rows"]
    runner.close()
    best = max(
        (values["samples_per_s"]["median"], peer)
        for peer, values in row["peers"].items()
        if peer != "hotloop"
    )
    mine = row["peers"]["hotloop"]["samples_per_s"]["median"]
    print(
        f"{name} batch {batch}{'' if max_error is None else ' lossy'}: {mine:,.0f}/s by "
        f"{row['setting']} {row['precision']}, {mine / best[0]:.3f}x {best[1]}; error "
        f"{errors['hotloop']:.1e}",
        flush=True,
    )
    return row


def rate(call: Callable[[], Any]) -> float:
    """Calls a second, each to the end of its work."""
    call()
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + TURN_S:
        call()
        torch.cuda.synchronize()
        count += 1
    return count / (now - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["train", "infer"])
    parser.add_argument("--models", default=",".join(SAMPLE_SHAPES), help="of inference")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    device = torch.cuda.get_device_properties(0)
    record = about() | {
        "gpu": device.name, "gpu_memory_bytes": device.total_memory, "cuda": torch.version.cuda,
        "train": [], "infer": [],
    }  # fmt: skip

    def keep() -> None:
        if options.out is not None:
            options.out.write_text(json.dumps(record, indent=1) + "\n")

    if options.only != "infer":
        for name in ("small", "cnn"):
            for count in GUIDE_EPOCH_S:
                record["train"].append(train_row(name, count, options.rounds))
                keep()
    if options.only != "train":
        for name in options.models.split(","):
            for batch in GUIDE_PER_S:
                record["infer"].append(infer_row(name, batch, options.rounds, None))
                keep()
            record["infer"].append(infer_row(name, 64, options.rounds, 0.03))
            keep()


if __name__ == "__main__":
    main()
