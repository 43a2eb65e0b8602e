"""All connections of a server: their limits and sums, who answers, and the look at the clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from ..machine.tcp_info import LAST_DATA_RECEIVED, TICK_S, since_s
from .limits import Limits
from .message import Request

# After a pause of this length the loop has waited for bytes: what it reads has only just come.
_WAITED_S = 0.05
_READ_BYTES = 256 * 1024
# A look at the sockets after less than this needs no better time of arrival.
_PROMPT_S = 0.005


class ManagedConnection(Protocol):
    """What the manager asks of a connection; see ``Connection``."""

    due_at: float

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being received or answered."""

    @property
    def has_unsent(self) -> bool:
        """Whether some of an answer has not been taken by the client's side yet."""

    def time_is_up(self) -> None:
        """Called once ``due_at`` has passed."""

    def close(self) -> None:
        """Close after what was written has been sent."""

    def abort(self) -> None:
        """Close at once."""


class ConnectionManager:
    """What the connections of a server share: limits, sums, and who answers.

    Args:
        limits: of the server.
        gate: called when the headers of a request are there; raises ``Refusal`` to have it answered
            so, its body read and thrown away.
        handle: called with each whole request; it answers now or later.
        on_answer: called after each answer with the request and its status.
        max_connections: open at once.
    """

    def __init__(
        self,
        limits: Limits,
        gate: Callable[[Request], None],
        handle: Callable[[Request], None],
        on_answer: Callable[[Request, int], None],
        max_connections: int | None = None,
    ) -> None:
        self.limits = limits
        self.gate = gate
        self.handle = handle
        self.on_answer = on_answer
        self.max_connections = max_connections or limits.max_connections
        self.connections: dict[ManagedConnection, None] = {}
        self.buffered_bytes = 0
        self.unanswered = 0
        self.draining = False
        self.timed_out = 0
        self.evicted = 0
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        self._reading = False
        self._turn_at = self._turn_ended_at = self._earliest_s = self._looked_at = 0.0
        self._turn_s = 0.0
        self.turn = 0  # Number of the loop's present look at its sockets.

    def earliest_arrival_s(self) -> float:
        """The earliest time at which what is read or accepted now can have come; monotonic seconds.

        The loop serves all sockets that are ready, one after the other, then looks for the next.
        With thousands of them that takes long, and what comes meanwhile has waited since then:
        a deadline counts from there, not from when a busy loop got round to it.
        """
        if not self._reading:
            self._reading = True
            self.turn += 1
            self._looked_at = self._turn_at
            self._turn_at = now = time.monotonic()
            waited = now - self._turn_ended_at > _WAITED_S
            self._earliest_s = now if waited else now - self._turn_s
            # Run when all that is ready has been read.
            asyncio.get_running_loop().call_soon(self._end_turn)
        return self._earliest_s

    def arrival_s(
        self, transport: asyncio.Transport | None, estimate_s: float, *, is_first: bool
    ) -> float:
        """When the bytes that are being read came; monotonic seconds.

        After a long turn, or one that other threads held up, the kernel is asked: a connection may
        have waited in the listen queue, or the loop for its processor.

        Args:
            estimate_s: by ``earliest_arrival_s``, for where the kernel does not tell.
            is_first: whether nothing has come on this connection before; nobody knows how long
                it has waited to be accepted.
        """
        now = time.monotonic()
        prompt = now - self._looked_at < _PROMPT_S and not is_first
        if prompt or transport is None:
            return estimate_s
        since = since_s(transport.get_extra_info("socket"), LAST_DATA_RECEIVED)
        return estimate_s if since is None else now - since - TICK_S

    def _end_turn(self) -> None:
        self._reading = False
        self._turn_ended_at = time.monotonic()
        self._turn_s = self._turn_ended_at - self._turn_at

    def sweep(self) -> None:
        """Close what has taken too long. A timer each would cost more than it finds."""
        now = time.monotonic()
        for connection in [c for c in self.connections if c.due_at <= now]:
            self.timed_out += 1
            connection.time_is_up()

    def make_room(self) -> bool:
        """Close the connection that has been idle for longest; whether there was one."""
        idle = [c for c in self.connections if c.is_idle]
        if not idle:
            return False
        # One search makes room for many: it costs a look at each of them.
        idle.sort(key=lambda c: c.due_at)
        for connection in idle[: max(1, len(idle) // 16)]:
            self.evicted += 1
            connection.close()
        return True

    def drain(self) -> None:
        """No connection is kept after its present request."""
        self.draining = True
        for connection in list(self.connections):
            if connection.is_idle:
                connection.close()
