"""The coordinator: starts the peers, lets them run an epoch in turn, collects the figures."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..machine import Machine
from .result import Race, Timing

# What preparing (compiling, importing) and one epoch may take.
_PREPARE_S = 300.0
_EPOCH_S = 240.0


def race_training(
    model: str,
    peers: Sequence[str],
    *,
    num_samples: int = 10_000,
    batch_size: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    precision: str = "float32",
    workers: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Race:
    """Train ``model`` with each peer, epoch by epoch in turn, on the same batches of MNIST.

    The first epoch of each peer is its warm-up and not counted.

    Args:
        model: ``small``, ``big``, ``cnn`` or ``large``.
        peers: names from ``bench.peers.PEERS``, ``hotloop``, ``workers-K`` (hotloop, data-parallel
            on K workers) and ``ddp-K`` (DistributedDataParallel on K processes).
        rounds: measured epochs of each peer.
        threads: of each peer; ``None``: the usable CPUs.
        precision: of hotloop's step. workers: of ``hotloop``; ``None``: one step with all threads.
        say: told what is going on.
    """
    import numpy
    import torch

    from ..data import load_mnist
    from ..train.zoo import build_model

    machine = Machine.probe()
    threads = threads or machine.usable_cpus
    with tempfile.TemporaryDirectory(prefix="hotloop-bench-") as name:
        folder = Path(name)
        dataset = load_mnist("train", num_samples=num_samples)
        x = torch.empty(num_samples, *dataset.sample_shape)
        y = torch.empty(num_samples, dtype=torch.int64)
        dataset.gather(torch.arange(num_samples), x, y)
        numpy.save(folder / "x.npy", x.numpy())
        numpy.save(folder / "y.npy", y.numpy())
        torch.manual_seed(0)
        network = build_model(model)
        torch.save(network.state_dict(), folder / "weights.pt")
        floors = _floors(network, x[:batch_size], y[:batch_size], num_samples, threads)
        del x, y
        setup = {
            "model": model, "folder": name, "batch_size": batch_size, "threads": threads,
            "precision": precision, "workers": workers, "epochs": rounds + 1,
        }  # fmt: skip
        timings = _run(list(peers), setup, rounds, say)
    return Race(
        model, num_samples, batch_size, threads, timings, *floors,
        {"machine": machine.to_dict()["cpu_model"], "fingerprint": machine.fingerprint(),
         "precision": precision, "workers": workers, "versions": _versions(),
         # Not where it lay on this machine.
         "data": re.sub(r"\(/[^)]*\)", "(IDX files)", dataset.description)},
    )  # fmt: skip


def _run(
    peers: list[str], setup: dict[str, Any], rounds: int, say: Callable[[str], None]
) -> tuple[Timing, ...]:
    from .peers import PEERS

    running: dict[str, _Process] = {}
    missing: dict[str, str] = {}
    figures: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    try:
        for peer in peers:
            extra = PEERS[peer][1] if peer in PEERS else None
            if extra is not None and importlib.util.find_spec(extra) is None:
                missing[peer] = f"not installed: pip install 'hotloop[peers]' (or {extra})"
                continue
            say(f"{setup['model']}: preparing {peer}")
            process = _Process(peer, setup)
            try:
                process.read(_PREPARE_S)
                for number in range(1):  # The warm-up, while nobody else is measured.
                    figures[peer].append(process.epoch(number))
                running[peer] = process
            except RunError as error:
                process.kill()
                missing[peer] = str(error)
        for number in range(1, rounds + 1):
            for peer in list(running):
                say(f"{setup['model']}: round {number} of {rounds}, {peer}")
                try:
                    figures[peer].append(running[peer].epoch(number))
                except RunError as error:
                    running.pop(peer).kill()
                    missing[peer] = str(error)
    finally:
        for process in running.values():
            process.kill()
    return tuple(
        Timing(peer, missing=missing[peer])
        if peer in missing
        else Timing(
            peer,
            tuple(f["s"] for f in figures[peer][1:]),
            tuple(f["loss"] for f in figures[peer]),
            figures[peer][-1]["peak_bytes"],
        )
        for peer in peers
    )


class _Process:
    """A peer's process and its two pipes."""

    def __init__(self, peer: str, setup: dict[str, Any]) -> None:
        self.peer = peer
        path = Path(setup["folder"]) / f"{peer}.json"
        path.write_text(json.dumps({**setup, "peer": peer}))
        threads = str(setup["threads"])
        self.errors = (Path(setup["folder"]) / f"{peer}.err").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hotloop.bench.peer", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )

    def read(self, limit_s: float) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise RunError(f"{self.peer} must answer within {limit_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            raise RunError(f"{self.peer} must run", got=last[:200])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def epoch(self, number: int) -> dict[str, Any]:
        """Run one epoch."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"epoch": number}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # read() says why.
        return self.read(_EPOCH_S)

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # What was not yet written.
                    pipe.close()


def _floors(
    model: Any, x: Any, y: Any, num_samples: int, threads: int
) -> tuple[float | None, float | None]:
    """Seconds of an epoch by arithmetic and bandwidth: the longer, and both in turn."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    ceilings = Machine.probe().cached_ceilings()
    if ceilings is None:
        return None, None
    rate = ceilings.best_matmul_flop_per_s("float32", threads)
    bandwidth = ceilings.best_bandwidth_bytes_per_s(threads)
    if rate is None or bandwidth is None:
        return None, None
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad()
    arithmetic = counter.get_total_flops() / len(x) * num_samples / rate
    # Adam on a gradient that never leaves the cache reads and writes weight and two moments.
    moved = 24 * sum(p.numel() for p in model.parameters())
    memory = moved * (num_samples / len(x)) / bandwidth
    return max(arithmetic, memory), arithmetic + memory


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "jax", "jaxlib", "lightning", "keras", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
