"""What a number of workers of given speeds would do with a step: list scheduling, by events.

The rules are those of ``kernels/cpp/team.cpp``: a worker takes the first of its own chunks, then
the last of whoever has most left, if that is at least the threshold.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SimulatedStep:
    """Outcome of one simulated step.

    Attributes:
        wall_s: until the last chunk is done, and the update.
        chunks: run by each worker. stolen: how many of them were another's.
    """

    wall_s: float
    chunks: tuple[int, ...]
    stolen: tuple[int, ...]


def simulate_step(
    rates: Sequence[float],
    queues: Sequence[int],
    *,
    steal_threshold: int | None = 1,
    update_s: float = 0.0,
    overhead_s: float = 0.0,
) -> SimulatedStep:
    """One step of workers that run ``rates`` chunks a second and begin with ``queues`` chunks.

    Args:
        steal_threshold: chunks a worker must have left for another to take one; ``None``: never.
        update_s: the update on one worker; it is shared by all.
        overhead_s: of one meeting of all workers; a step has three.
    """
    left = list(queues)
    done, stolen = [0] * len(rates), [0] * len(rates)
    events = [(0.0, worker) for worker in range(len(rates))]
    heapq.heapify(events)
    end = 0.0
    while events:
        now, worker = heapq.heappop(events)
        if left[worker]:
            left[worker] -= 1
        else:
            victim = max(range(len(left)), key=left.__getitem__)
            if steal_threshold is None or left[victim] < max(1, steal_threshold):
                continue
            left[victim] -= 1
            stolen[worker] += 1
        done[worker] += 1
        end = max(end, now + 1 / rates[worker])
        heapq.heappush(events, (now + 1 / rates[worker], worker))
    wall_s = end + update_s / len(rates) + 3 * overhead_s
    return SimulatedStep(wall_s, tuple(done), tuple(stolen))
