"""All connections of a server: their limits and sums, who answers, and the look at the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from .connection import Connection
from .limits import Limits
from .message import Request


class Hub:
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
        self.connections: dict[Connection, None] = {}
        self.buffered_bytes = 0
        self.unanswered = 0
        self.draining = False
        self.timed_out = 0
        self.evicted = 0

    def __call__(self) -> Connection:
        """A new connection, for ``create_server``."""
        return Connection(self)

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
