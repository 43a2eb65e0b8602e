"""How many chunks each worker begins a step with: in proportion to the rates they showed.

Work stealing evens out what a step brings; the balancer keeps it rare. Both change who computes a
chunk, never what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import InputError


@dataclass(frozen=True)
class WorkerStats:
    """What is known of one worker.

    Attributes:
        rate_per_s: chunks a second while busy, smoothed; ``None``: it has not run one yet.
        queue: chunks it begins the next step with.
        chunks: run so far, ``stolen`` of them another worker's.
        busy_s, wait_s, update_s: seconds running chunks, waiting for others, updating weights.
        slowdown: its rate over the best it ever showed, 1 at most: below, its core is throttled or
            shared with somebody; ``None``: not known yet.
    """

    rate_per_s: float | None = None
    queue: int = 0
    chunks: int = 0
    stolen: int = 0
    lost: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    update_s: float = 0.0
    slowdown: float | None = None
    cpu_share: float | None = None


class BatchSizeAdjuster:
    """Cuts a batch of equal chunks in proportion to rates.

    Args:
        least_gain: shares are changed only where the slowest worker would end sooner by this
            fraction, so that noise does not move them to and fro.
    """

    def __init__(self, least_gain: float = 0.05) -> None:
        self.least_gain = least_gain

    def shares(
        self, num_chunks: int, rates: Sequence[float], now: Sequence[int] | None = None
    ) -> list[int]:
        """Chunks of each worker: each next one goes to whoever would end it first.

        Args:
            num_chunks: of a batch. rates: chunks a second of each worker, above 0.
            now: present shares, kept where the gain is too small.
        """
        if not rates or min(rates) <= 0:
            raise InputError("rates must be above 0", got=list(rates))
        shares = [0] * len(rates)
        for _ in range(num_chunks):
            first = min(range(len(rates)), key=lambda w: (shares[w] + 1) / rates[w])
            shares[first] += 1
        if now is not None and sum(now) == num_chunks:
            ends = [max(s / r for s, r in zip(cut, rates, strict=True)) for cut in (now, shares)]
            if ends[1] > ends[0] * (1 - self.least_gain):
                return list(now)
        return shares


class LoadBalancer:
    """Keeps ``WorkerStats`` and the chunks that each worker begins with.

    Args:
        num_workers: at least 1. num_chunks: of a batch, at least 1.
        adjuster: how shares are cut.
        smoothing: weight of the newest rate, above 0, at most 1.
    """

    def __init__(
        self,
        num_workers: int,
        num_chunks: int,
        adjuster: BatchSizeAdjuster | None = None,
        smoothing: float = 0.3,
    ) -> None:
        if num_workers < 1 or num_chunks < 1:
            raise InputError(
                "a balancer needs at least one worker and one chunk",
                got=f"{num_workers} workers, {num_chunks} chunks",
            )
        self.num_chunks = num_chunks
        self.adjuster = adjuster or BatchSizeAdjuster()
        self.smoothing = smoothing
        equal = self.adjuster.shares(num_chunks, [1.0] * num_workers)
        self.workers = [WorkerStats(queue=share) for share in equal]
        self._best = [0.0] * num_workers

    def record(
        self,
        worker: int,
        chunks: int,
        busy_s: float,
        *,
        stolen: int = 0,
        wait_s: float = 0.0,
        update_s: float = 0.0,
        cpu_s: float | None = None,
        begun: int | None = None,
    ) -> None:
        """What a worker did since the last time, of ``begun`` chunks that were its own."""
        old = self.workers[worker]
        rate, slowdown, share = old.rate_per_s, old.slowdown, old.cpu_share
        if chunks and busy_s > 0:
            rate = self._smoothed(rate, chunks / busy_s)
            if cpu_s is not None:
                share = self._smoothed(share, min(1.0, cpu_s / busy_s))
            self._best[worker] = max(self._best[worker], rate)
            slowdown = rate / self._best[worker]
        self.workers[worker] = WorkerStats(
            rate_per_s=rate,
            queue=old.queue,
            chunks=old.chunks + chunks,
            stolen=old.stolen + stolen,
            lost=old.lost + (0 if begun is None else begun - (chunks - stolen)),
            busy_s=old.busy_s + busy_s,
            wait_s=old.wait_s + wait_s,
            update_s=old.update_s + update_s,
            slowdown=slowdown,
            cpu_share=share,
        )

    def _smoothed(self, old: float | None, newest: float) -> float:
        return newest if old is None else old + self.smoothing * (newest - old)

    def balance_load(self) -> list[int]:
        """Chunks that each worker begins the next step with; they add up to ``num_chunks``.

        A worker whose rate is not known is taken for an average one.
        """
        known = [w.rate_per_s for w in self.workers if w.rate_per_s]
        if known:
            mean = sum(known) / len(known)
            rates = [w.rate_per_s or mean for w in self.workers]
            queues = self.adjuster.shares(self.num_chunks, rates, [w.queue for w in self.workers])
            self.workers = [replace(w, queue=q) for w, q in zip(self.workers, queues, strict=True)]
        return [w.queue for w in self.workers]
