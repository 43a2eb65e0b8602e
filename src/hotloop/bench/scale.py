"""How training scales over workers: rates, efficiency, and what the simulator predicts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..measure import Turns
from .result import Race

_BATCHES = 40


@dataclass(frozen=True)
class StepCosts:
    """Costs of a data-parallel step on one worker.

    Attributes:
        chunk_s: of running one chunk. update_s: of the whole update. rest_s: all else of a step.
        num_chunks: of a batch. chunk_size: samples.
    """

    chunk_s: float
    update_s: float
    rest_s: float
    num_chunks: int
    chunk_size: int

    def samples_per_s(self, num_workers: int, num_chunks: int | None = None) -> float:
        """Predicted rate of equal workers that do not slow each other down."""
        from ..parallel.simulate import simulate_step

        chunks = num_chunks or self.num_chunks
        queues = [
            chunks // num_workers + (worker < chunks % num_workers) for worker in range(num_workers)
        ]
        step = simulate_step(
            [1 / self.chunk_s] * num_workers, queues, update_s=self.update_s, overhead_s=0.0
        )
        return chunks * self.chunk_size / (step.wall_s + self.rest_s)


def measure_costs(model: str, batch_size: int) -> StepCosts:
    """Costs of a step of a zoo model on one worker of this machine.

    Raises:
        RunError: the model cannot be run in chunks here.
    """
    import torch

    from ..errors import RunError
    from ..parallel import ParallelStep
    from ..plan import Plan
    from ..train.zoo import build_model

    torch.manual_seed(0)
    network = build_model(model).train()
    optimizer = torch.optim.Adam(network.parameters())
    x, y = torch.rand(batch_size, 1, 28, 28), torch.randint(0, 10, (batch_size,))
    plan = Plan().replace({"parallel.num_workers": 1})
    step = ParallelStep(network, torch.nn.functional.cross_entropy, optimizer, (x, y), plan)
    for _ in range(3):  # Two are recorded.
        step(x, y)
    if step.path != "parallel":
        raise RunError("workers need a batch of whole chunks", got=step.reason)
    walls, chunks, updates = [], [], []
    try:
        turns = Turns({"step": lambda: step(x, y)}, rounds=_BATCHES)
        (before,) = step.workers
        for played in turns:
            (after,) = step.workers
            if turns.played > _BATCHES // 4:
                walls.append(played["step"].median_s)
                chunks.append((after.busy_s - before.busy_s) / step.num_chunks)
                updates.append(after.update_s - before.update_s)
            before = after
    finally:
        step.close()
    chunk_s, update_s = statistics.median(chunks), statistics.median(updates)
    rest_s = max(0.0, statistics.median(walls) - chunk_s * step.num_chunks - update_s)
    return StepCosts(chunk_s, update_s, rest_s, step.num_chunks, step.chunk_size)


def scale_rows(race: Race, costs: StepCosts | None) -> list[dict[str, Any]]:
    """For each peer of a race that ran: rate, efficiency and prediction.

    Efficiency is the rate over that of ``workers-1`` times the number of workers.
    """
    rates = {t.peer: race.num_samples / t.median_s for t in race.timings if t.seconds}
    one = rates.get("workers-1")
    rows = []
    for peer, rate in rates.items():
        kind, _, count = peer.partition("-")
        workers = int(count) if kind in ("workers", "ddp") else None
        predicted = None
        if costs is not None and kind == "workers" and workers is not None:
            predicted = costs.samples_per_s(workers)
        rows.append(
            {
                "peer": peer,
                "samples_per_s": rate,
                "efficiency": rate / (one * workers) if one and workers else None,
                "predicted_per_s": predicted,
            }
        )
    return rows


def predictions(costs: StepCosts, workers: Sequence[int]) -> list[dict[str, Any]]:
    """Rates of larger machines with four chunks for each worker, and their efficiency."""
    one = costs.samples_per_s(1, 4)
    rows = []
    for count in workers:
        rate = costs.samples_per_s(count, 4 * count)
        rows.append(
            {
                "num_workers": count,
                "batch_size": 4 * count * costs.chunk_size,
                "samples_per_s": rate,
                "efficiency": rate / (one * count),
            }
        )
    return rows
