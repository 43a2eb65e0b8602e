"""The peer ``ddp-K``: DistributedDataParallel on K processes (gloo), as PyTorch's tutorials do it.

Rank 0 is the peer's process; it starts the others (``python -m hotloop.bench.ddp SETUP.json RANK``)
and tells them each epoch. Every rank takes its part of the rows of each batch, from memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn


def start(
    setup: dict[str, Any], path: str, model: nn.Module, x: Any, y: Any
) -> Callable[[numpy.ndarray], float]:
    """``epoch(order) -> mean loss`` of rank 0, with the other ranks at its heels."""
    world = int(setup["peer"].split("-")[1])
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "hotloop.bench.ddp", path, str(rank)],
            stdin=subprocess.PIPE,
            text=True,
        )
        for rank in range(1, world)
    ]
    run = _rank(setup, model, x, y, 0, world)

    def epoch(order: numpy.ndarray) -> float:
        for process in others:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order.tolist()) + "\n")
            process.stdin.flush()
        return run(order)

    return epoch


def _rank(
    setup: dict[str, Any], model: nn.Module, x: Any, y: Any, rank: int, world: int
) -> Callable[[numpy.ndarray], float]:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(max(1, setup["threads"] // world))
    distributed.init_process_group(
        "gloo", init_method=f"file://{setup['folder']}/ddp-{world}", rank=rank, world_size=world
    )
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    samples, labels = torch.from_numpy(x), torch.from_numpy(y)
    size = setup["batch_size"]

    def epoch(order: numpy.ndarray) -> float:
        at = torch.from_numpy(order)
        total, count = torch.zeros(()), 0
        for start in range(0, len(at), size):
            rows = at[start : start + size].chunk(world)
            # A last batch with fewer rows than ranks is left out by all of them.
            if len(rows) < world:
                break
            mine = rows[rank]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(samples[mine]), labels[mine])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(mine)
            count += len(mine)
        return total.item() / count

    return epoch


def main() -> int:
    """A rank but the first: an epoch for each line read."""
    setup, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    from ..train.zoo import build_model

    folder = Path(setup["folder"])
    model = build_model(setup["model"])
    model.load_state_dict(torch.load(folder / "weights.pt"))
    x, y = numpy.load(folder / "x.npy"), numpy.load(folder / "y.npy")
    run = _rank(setup, model, x, y, rank, int(setup["peer"].split("-")[1]))
    for line in sys.stdin:
        run(numpy.array(json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
