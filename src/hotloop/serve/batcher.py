"""Requests to batches to instances of the engine: when to run, with how many, and whom to refuse.

An instance that is free takes what waits, at once. It holds back only while the engine would not
keep up with calls this small and the missing rows are on their way (``_hold_until``); the size it
aims at is the smallest with nearly the best rate that keeps the latency target
(``CostCurve.best_rows``). A batch is chosen at the last moment, by the thread that runs it, so that
nothing waits for the event loop; the loop is woken once for each batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy

from ..infer import Engine
from ..machine import give_way, pinned_thread
from .cost import CostCurve
from .log import Log
from .message import Refusal, busy
from .stats import Stats
from .tensors import Signature
from .warm import Buffers, make_buffers, warm_up, warm_up_together
from .work import Work

_MAX_SCAN = 256  # Requests looked at for others of the same shape.
_MARGIN_S = 0.002  # From an answer's last byte here to the client, beside what is measured.
_LAST_S = 0.001  # From the last look at the clock to the client's side of the socket.
_LAG_HALVED_S = 0.5  # A lag of the loop is expected again for about as long.
_PROBE_S = 1.0  # An estimate that has kept the engine idle for so long is put to the test.
_MANY_GONE = 32
# Instances keep every CPU busy under load. With the loop's priority they would take half of its
# time: it then falls behind the sockets, and answers that are ready come late.
_GIVES_WAY = 5
# Of the time that is left to a request, what the estimate of its answer may fill: calls differ, and
# a loop that others hold up for a moment would send what is ready at the last moment too late.
_SURE = 0.9
# A body whose headers were let in is expected for as long; a slower one no longer counts.
_COMING_S = 1.0


class Batcher:
    """The queue before one engine, and the threads that run it.

    Args:
        engine: to run; closed by ``close``.
        signature: of the engine.
        loop: answers are given in its thread.
        stats: counts.
        max_batch: rows of a call put together from several requests.
        target_s: the latency that 99 of 100 answers should keep while the engine can.
        max_queue: requests that may wait.
        cpus: where each instance's thread may run; empty: anywhere.
        log: where failures of the engine are told.
    """

    def __init__(
        self,
        engine: Engine,
        signature: Signature,
        loop: asyncio.AbstractEventLoop,
        stats: Stats,
        log: Log,
        *,
        max_batch: int = 64,
        target_s: float = 0.02,
        max_queue: int = 1024,
        cpus: Sequence[Sequence[int]] = (),
    ) -> None:
        self.engine = engine
        self.signature = signature
        self.max_batch = max_batch if signature.batched else 1
        self.target_s = target_s
        self.max_queue = max_queue
        self.num_instances = engine.num_instances
        self.curve = CostCurve(self.max_batch)
        self.best_rows = 1  # Rows that a batch should have; looked up anew after each call.
        self._loop = loop
        self._stats = stats
        self._log = log
        self._queue: deque[Work] = deque()
        self._queued_rows = 0
        self._num_gone = 0  # Cancelled ones that still lie in the queue; they count nowhere.
        self._running_rows = 0
        # From the end of a call until the loop has written its answers, and when that was seen.
        self._lag_s = self._lag_seen_s = 0.0
        self._coming: dict[object, float] = {}  # Of the loop's thread alone.
        self._idle_since_s = time.monotonic()
        self.busy_instances = 0
        self._lock = threading.Lock()
        self._some = threading.Condition(self._lock)  # There is work.
        self._enough = threading.Condition(self._lock)  # There is as much as one waits for.
        self._sleeping = 0
        self._filling = False
        self._wanted = 0
        self._closing = False
        self._rate_per_s = 0.0
        self._new_rows = 0
        self._rate_since = time.monotonic()
        self._population = 1.0
        self._slip = 1.0
        self._buffers = [make_buffers(signature, self.max_batch) for _ in range(self.num_instances)]
        self._warm = threading.Barrier(self.num_instances + 1)
        self._threads = [
            threading.Thread(
                target=self._work, args=(at, tuple(cpus[at]) if cpus else ()),
                name=f"hotloop-instance-{at}", daemon=True,
            )
            for at in range(self.num_instances)
        ]  # fmt: skip

    # --- the loop's side

    def start(self) -> None:
        """Run the engine once with one row and once with many, then take requests."""
        warm_up(self.engine, self._buffers[0], self.curve)
        self.best_rows = self.curve.best_rows(self.target_s)
        for thread in self._threads:
            thread.start()
        self._warm.wait()

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._queue) - self._num_gone

    @property
    def rate_per_s(self) -> float:
        """Rows that arrive each second."""
        return self._rate_per_s

    def expect(self, request: object, deadline_s: float) -> None:
        """Let a request in on its headers; its body counts among what waits from here on.

        Else thousands would be let in beside each other by a queue that is empty, and refused when
        their bodies are here: what they took was for nothing.

        Args:
            request: tells it from the others in ``has_come``. deadline_s: monotonic seconds.

        Raises:
            Refusal: 429 when the queue is full or the deadline cannot be kept, 503 while closing.
        """
        now = time.monotonic()
        coming = self._coming
        while coming and now - next(iter(coming.values())) > _COMING_S:
            del coming[next(iter(coming))]
        with self._lock:
            if deadline_s == math.inf:
                self._refuse_if_full()  # All that is known before the body.
            else:
                self._admit(now, deadline_s, 1)
        coming[request] = now

    def has_come(self, request: object) -> None:
        """The body of a request is whole, or will not be."""
        self._coming.pop(request, None)

    def submit(self, work: Work) -> None:
        """Queue a request.

        Raises:
            Refusal: as ``check``.
        """
        now = time.monotonic()
        with self._lock:
            work.expected_s, work.is_probe = self._admit(now, work.deadline_s, work.rows)
            work.queued_s = now
            self._queue.append(work)
            self._queued_rows += work.rows
            self._new_rows += work.rows
            if self._filling:
                if self._queued_rows >= self._wanted:
                    self._enough.notify()
            elif self._sleeping:
                self._some.notify()

    def _admit(self, now: float, deadline_s: float, rows: int) -> tuple[float, bool]:
        """How long a request that is taken now will wait, and whether it is a probe.

        One that would be refused while the engine has been idle for long is a probe: it is run
        whatever the curve says. Else an engine that was slow once would never be seen to be fast
        again. The lock is held.
        """
        self._refuse_if_full()
        expected = self._wait_s()
        if deadline_s == math.inf:
            return expected, False
        idle = not self.num_queued and not self._running_rows
        call_s = self.curve.high_s(rows if idle else max(rows, self.best_rows))
        needed = expected * self._slip + call_s + self._lag(now) + _MARGIN_S
        if needed > _SURE * (deadline_s - now):
            if not idle or now - self._idle_since_s < _PROBE_S or now > deadline_s:
                raise busy(429, "the deadline cannot be kept", expected, "deadline not reachable")
            return expected, True
        return expected, False

    def _refuse_if_full(self) -> None:
        if self._closing:
            raise busy(503, "the server is stopping", 1.0, "stopping")
        if self.num_queued + len(self._coming) >= self.max_queue:
            raise busy(429, "the queue is full", self._wait_s(), "queue full")

    def _lag(self, now: float) -> float:
        """How long the loop may keep an answer that is ready now."""
        return float(self._lag_s * 0.5 ** ((now - self._lag_seen_s) / _LAG_HALVED_S))

    def cancel(self, work: Work) -> None:
        """Nobody waits for ``work`` any more: its place and memory are free at once.

        If it is running already, its answer is thrown away.
        """
        with self._lock:
            if work.cancelled:
                return
            work.cancelled = True
            if work.taken_s:
                return
            work.arrays = ()
            self._queued_rows -= work.rows
            self._num_gone += 1
            if self._num_gone > max(_MANY_GONE, len(self._queue) // 2):
                self._queue = deque(w for w in self._queue if not w.cancelled)
                self._num_gone = 0
        self._stats.dropped["client gone"] += 1

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish what is queued, stop the threads, close the engine; whether all was finished.

        Called from another thread than the loop's, which must go on running.
        """
        ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._closing = True
            self._some.notify_all()
            self._enough.notify_all()
        for thread in self._threads:
            left = None if ends_at is None else max(0.0, ends_at - time.monotonic())
            if thread.ident is not None:
                thread.join(left)
        finished = not any(thread.is_alive() for thread in self._threads)
        with self._lock:
            left_over = [work for work in self._queue if not work.cancelled]
            for work in left_over:
                work.taken_s = time.monotonic()
            self._queue.clear()
            self._queued_rows = self._num_gone = 0
        if left_over:
            self._post(
                self._refuse, left_over, busy(503, "the server is stopping", 1.0, "stopping")
            )
        if finished:
            self.engine.close()
        return finished and not left_over

    # --- the instances' side

    def _work(self, at: int, cpus: tuple[int, ...]) -> None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(pinned_thread(cpus))
            except Exception as error:
                self._log.warn("instance not pinned", instance=at, error=str(error))
            give_way(_GIVES_WAY)
            if self.num_instances > 1:
                warm_up_together(self.engine, self._buffers[at])
            with contextlib.suppress(threading.BrokenBarrierError):
                self._warm.wait()
            while (batch := self._next_batch()) is not None:
                if batch:
                    self._run(batch, self._buffers[at])

    def _next_batch(self) -> list[Work] | None:
        """The next batch, an empty one if all in it had expired, or ``None`` at the end."""
        with self._lock:
            held_until: float | None = None
            while True:
                while self._queue and self._queue[0].cancelled:
                    self._forget_first()
                if not self._queue:
                    if self._closing:
                        return None
                    held_until = None
                    self._sleep()
                    continue
                if self._filling:
                    self._sleep()
                    continue
                now = time.monotonic()
                if held_until is None:
                    held_until = self._hold_until(now)
                if now >= held_until or self._queued_rows >= self._wanted or self._closing:
                    break
                self._filling = True
                self._enough.wait(held_until - now)
                self._filling = False
            batch, gone = self._take(now)
            rows = sum(work.rows for work in batch)
            self._running_rows += rows
            self.busy_instances += bool(batch)
            if self._queue and self._sleeping:
                self._some.notify()
        if gone:
            self._post(self._drop, gone)
        return batch

    def _sleep(self) -> None:
        self._sleeping += 1
        self._some.wait()
        self._sleeping -= 1

    def _hold_until(self, now: float) -> float:
        """Until when it pays to wait for more rows; sets ``_wanted``, the number waited for.

        The rows that are on their way are at most those of the clients that have no answer yet, so
        a few clients that wait for their answers are never waited for.
        """
        since = now - self._rate_since
        if since >= 0.01:
            rate = self._new_rows / since
            keep = math.exp(-since / 0.25)
            self._rate_per_s = keep * self._rate_per_s + (1 - keep) * rate
            self._new_rows, self._rate_since = 0, now
        inside = self._queued_rows + self._running_rows
        self._population = max(inside, 0.98 * self._population)
        best = self.best_rows
        share = math.ceil(self._population / self.num_instances)
        limit = max(1, min(best, share))
        if self._rate_per_s <= 0 or limit <= self._queued_rows:
            self._wanted = limit
            return now
        wanted = self.curve.smallest_sustaining(self._rate_per_s, self.num_instances, limit)
        self._wanted = wanted
        missing = wanted - self._queued_rows
        if missing <= 0:
            return now
        slack = (self.target_s - self.curve.high_s(wanted)) / 2
        return min(now + 1.5 * missing / self._rate_per_s, self._queue[0].queued_s + slack)

    def _take(self, now: float) -> tuple[list[Work], list[Work]]:
        """The head of the queue as far as it fits in one batch, and those that came too late."""
        batch: list[Work] = []
        gone: list[Work] = []
        other: list[Work] = []
        rows = 0
        limit = self.best_rows
        queue = self._queue
        # Most deadlines are far away: only the others are looked at closely.
        answered = now + self._lag(now)
        soon = answered + self.curve.cost_s(self.max_batch)
        while queue and len(other) < _MAX_SCAN:
            work = queue[0]
            if work.cancelled:
                self._forget_first()
                continue
            too_late = (
                work.deadline_s < soon
                and not work.is_probe
                and answered + self.curve.cost_s(work.rows) > work.deadline_s
            )
            if too_late:
                work.taken_s = now
                gone.append(queue.popleft())
                continue
            if batch and work.key != batch[0].key:
                other.append(queue.popleft())
                continue
            if batch and rows + work.rows > limit:
                break
            batch.append(queue.popleft())
            rows += work.rows
            work.taken_s = now
            if rows >= limit:
                break
        queue.extendleft(reversed(other))
        self._queued_rows -= rows + sum(work.rows for work in gone)
        if batch and batch[0].expected_s > 0.001:
            seen = (now - batch[0].queued_s) / batch[0].expected_s
            self._slip += 0.05 * (min(4.0, max(0.5, seen)) - self._slip)
        return batch, gone

    def _forget_first(self) -> None:
        """Take a cancelled request out of the queue."""
        self._queue.popleft()
        self._num_gone -= 1

    def _run(self, batch: list[Work], buffers: Buffers) -> None:
        rows = sum(work.rows for work in batch)
        started = time.monotonic()
        outputs: list[numpy.ndarray] | None = None
        try:
            outputs = self._call(batch, rows, buffers)
        except Exception as error:
            self._log.error("engine failed", error=f"{type(error).__name__}: {error}", rows=rows)
        ended = time.monotonic()
        with self._lock:
            self._running_rows -= rows
            self.busy_instances -= 1
            self._idle_since_s = ended
            if outputs is not None:
                self.curve.add(rows, ended - started, ended)
                self.best_rows = self.curve.best_rows(
                    self.target_s, self._rate_per_s, self.num_instances
                )
        if outputs is not None:
            self._post(self._deliver, batch, outputs, rows, started, ended)
        elif len(batch) == 1:
            self._post(self._refuse, batch, Refusal(500, "the model failed on this input"))
        else:
            # One bad input must not fail the requests beside it.
            for work in batch:
                with self._lock:
                    self._running_rows += work.rows
                    self.busy_instances += 1
                self._run([work], buffers)

    def _call(self, batch: list[Work], rows: int, buffers: Buffers) -> list[numpy.ndarray]:
        arrays = []
        for at, buffer in enumerate(buffers):
            if buffer is not None and rows <= len(buffer):
                array = buffer[:rows]
                start = 0
                for work in batch:
                    array[start : start + work.rows] = work.arrays[at]
                    start += work.rows
            elif len(batch) == 1:
                # A copy: bytes from the network are neither aligned nor writable.
                array = numpy.array(batch[0].arrays[at])
            else:
                array = numpy.concatenate([work.arrays[at] for work in batch])
            arrays.append(array)
        outputs = self.engine.run(arrays)
        specs = self.signature.outputs
        if len(outputs) != len(specs):
            raise ValueError(f"{len(outputs)} outputs, not {len(specs)}")
        for spec, output in zip(specs, outputs, strict=True):
            if str(output.dtype) != spec.dtype or (self.signature.batched and len(output) != rows):
                raise ValueError(f"output {spec.name} is {output.dtype} {list(output.shape)}")
        return outputs

    # --- back in the loop's thread

    def _post(self, call: Callable[..., None], *args: object) -> None:
        # The loop is closed only when the limit of draining has passed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _deliver(
        self,
        batch: list[Work],
        outputs: list[numpy.ndarray],
        rows: int,
        started_s: float,
        ended_s: float,
    ) -> None:
        self._stats.batch(
            rows, ended_s - started_s, [work.taken_s - work.queued_s for work in batch]
        )
        start = 0
        for work in batch:
            end = start + work.rows
            if work.cancelled:
                self._stats.dropped["client gone while running"] += 1
            elif time.monotonic() + _LAST_S > work.deadline_s:
                work.done(Refusal(504, "the deadline has passed", reason="deadline"))
            elif len(batch) == 1:
                work.done(outputs)
            else:
                work.done([output[start:end] for output in outputs])
            start = end
        now = time.monotonic()
        lag_s = now - ended_s
        if lag_s > self._lag(now):
            self._lag_s, self._lag_seen_s = lag_s, now

    def _drop(self, gone: list[Work]) -> None:
        for work in gone:
            if not work.cancelled:
                work.done(Refusal(504, "the deadline has passed", reason="deadline"))

    def _refuse(self, batch: list[Work], refusal: Refusal) -> None:
        for work in batch:
            if not work.cancelled:
                work.done(refusal)

    # --- helpers

    def _wait_s(self) -> float:
        """How long a request that comes now will wait."""
        rows = self._queued_rows + len(self._coming) + self._running_rows / 2
        return rows and rows * self.curve.cost_s(self.best_rows) / (
            self.best_rows * self.num_instances
        )
