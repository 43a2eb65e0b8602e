"""The race of training: the same batches for each peer, an epoch a turn, and the figures."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine import Machine
from .result import Race, Timing
from .turns import about, need, start_peer, summary, take_turns

if TYPE_CHECKING:
    from ..train.child import Child

# What preparing (compiling, importing) and one epoch may take.
_PREPARE_S = 300.0
_EPOCH_S = 240.0
# Takes turns with the peers and measures what the machine reaches.
_RATES = "rates"
_LIBRARIES = ("torch", "jax", "jaxlib", "lightning", "keras", "numpy")


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
        work = _work(network, x[:batch_size], y[:batch_size], num_samples)
        del x, y
        setup = {
            "model": model, "folder": name, "batch_size": batch_size, "threads": threads,
            "precision": precision, "workers": workers, "epochs": rounds + 1,
        }  # fmt: skip
        timings, rates = _run(list(peers), setup, rounds, say)
    return Race(
        model, num_samples, batch_size, threads, timings, *_floors(*work, rates), rates,
        {**about(machine, _LIBRARIES), "precision": precision, "workers": workers,
         # Not where it lay on this machine.
         "data": re.sub(r"\(/[^)]*\)", "(IDX files)", dataset.description)},
    )  # fmt: skip


def _run(
    peers: list[str], setup: dict[str, Any], rounds: int, say: Callable[[str], None]
) -> tuple[tuple[Timing, ...], dict[str, Any]]:
    from .peers import PEERS

    def start(peer: str) -> Child:
        if peer == _RATES:
            return start_peer("hotloop.bench.rates", peer, setup)
        extra = PEERS[peer][1] if peer in PEERS else None
        if extra is not None:
            need(extra)
        return start_peer("hotloop.bench.peer", peer, setup)

    told = take_turns(
        [*peers, _RATES], start, rounds, prepare_s=_PREPARE_S, turn_s=_EPOCH_S,
        say=lambda line: say(f"{setup['model']}: {line}"),
    )  # fmt: skip
    measured = told.pop(_RATES).answers[1:]
    rates = {
        name: summary([answer[name] for answer in measured])
        for name in ("flop_per_s", "bytes_per_s")
        if measured
    }
    timings = tuple(
        Timing(peer, missing=turns.missing)
        if turns.missing is not None
        else Timing(
            peer,
            tuple(f["s"] for f in turns.answers[1:]),
            tuple(f["loss"] for f in turns.answers),
            turns.answers[-1]["peak_bytes"],
        )
        for peer, turns in told.items()
    )
    return timings, rates


def _work(model: Any, x: Any, y: Any, num_samples: int) -> tuple[float, float]:
    """Floating-point operations of an epoch, and the bytes of its updates."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad()
    steps = num_samples / len(x)
    # Adam on a gradient that never leaves the cache reads and writes weight and two moments.
    moved = 24 * sum(p.numel() for p in model.parameters())
    return counter.get_total_flops() * steps, moved * steps


def _floors(
    flop: float, moved_bytes: float, rates: dict[str, Any]
) -> tuple[float | None, float | None]:
    """Seconds of an epoch by arithmetic and bandwidth: the longer, and both in turn."""
    if not rates:
        return None, None
    arithmetic = flop / rates["flop_per_s"]["median"]
    memory = moved_bytes / rates["bytes_per_s"]["median"]
    return max(arithmetic, memory), arithmetic + memory
