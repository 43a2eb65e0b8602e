"""Load on a server at a chosen rate, whatever its answers do, and how long each answer took.

Open loop: requests fall due at times drawn beforehand. A client that waits for an answer before it
sends the next request stops asking while the server stalls, and so hides the stall ("coordinated
omission", Tene 2013). Here a request that falls due during a stall is sent, or waits for a free
connection, and its latency counts from the time it fell due.

One thread, sockets that do not block, ``epoll``, and llhttp's parser (``httptools``), because the
server is often measured on the same CPUs; ``generator_cpu_share`` says what was taken from them.
Short of CPU this process itself is late, in sending (``lag``) and in reading what has come. Neither
is the server's doing: with ``stamped`` the kernel says when each answer came (``SO_TIMESTAMPNS``).
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError, MissingExtraError, RunError
from ..machine.tcp_info import LAST_ACK_RECEIVED, TICK_S, since_s
from .histogram import LatencyHistogram

Arrivals = Literal["poisson", "fixed"]
_RECV_BYTES = 65536
# A server that lives is told within this.
_CONNECT_S = 5.0
_SELECT_LIMIT = 1024
# Linux: time of arrival beside the bytes, as seconds and nanoseconds; Python has no name for it.
_SO_TIMESTAMPNS = 35
_STAMP = struct.Struct("@qq")
UNANSWERED, CONNECTION_ERROR, NOT_SENT = "unanswered", "connection error", "not sent"


@dataclass(frozen=True)
class LoadReport:
    """What one stretch of load gave.

    Attributes:
        rate_per_s: requests asked for. duration_s: of sending. wall_s: until the last answer.
        arrivals: ``"poisson"`` or ``"fixed"``.
        samples_per_request: in each body.
        scheduled: requests that fell due.
        outcomes: how many ended how: a status code as text, ``"unanswered"`` (no answer within
            ``timeout_s``: a silent drop), ``"connection error"`` (refused, reset, or closed without
            an answer) and ``"not sent"`` (no connection was free to the end). Their sum is
            ``scheduled``.
        latency: of answers with status 200, from the time they fell due.
        service: of the same, from the time they were sent: what a closed loop would have seen.
        came: of the same, from the time they were sent until the kernel had the answer; empty
            without ``stamped``. The first request of a connection is sent when it is asked for, or
            later by as long as this process let a connection wait that stood already.
        others: latency of all other answers.
        lag: from falling due to being sent.
        connections: most that were open at the same time.
        generator_cpu_share: CPU seconds of this process over ``wall_s``.
        timeout_s: after which an answer is given up.
    """

    rate_per_s: float
    duration_s: float
    wall_s: float
    arrivals: str
    samples_per_request: int
    scheduled: int
    outcomes: dict[str, int]
    latency: LatencyHistogram
    service: LatencyHistogram
    came: LatencyHistogram
    others: LatencyHistogram
    lag: LatencyHistogram
    connections: int
    generator_cpu_share: float
    timeout_s: float

    @property
    def answered_per_s(self) -> float:
        """Answers with status 200 a second, over the time until the last answer."""
        return self.latency.count / self.wall_s

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        document = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not isinstance(getattr(self, f.name), LatencyHistogram)
        }
        for name in ("latency", "service", "came", "others", "lag"):
            document[name] = getattr(self, name).to_dict()
        return {
            **document,
            "answered_per_s": self.answered_per_s,
            "samples_per_s": self.answered_per_s * self.samples_per_request,
        }


@dataclass
class _State:
    """What the connections of one stretch share."""

    requests: Sequence[bytes]
    epoll: select.epoll
    timeout_s: float
    stamped: bool = False
    clock_offset_s: float = 0.0  # Time of day less ``perf_counter``.
    idle: list[_Connection] = field(default_factory=list)
    by_fd: dict[int, _Connection] = field(default_factory=dict)
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    service: LatencyHistogram = field(default_factory=LatencyHistogram)
    came: LatencyHistogram = field(default_factory=LatencyHistogram)
    others: LatencyHistogram = field(default_factory=LatencyHistogram)
    lag: LatencyHistogram = field(default_factory=LatencyHistogram)
    sent: int = 0
    ended: int = 0


class _Connection:
    """One connection with at most one request on its way."""

    def __init__(self, state: _State, address: tuple[Any, ...], family: int) -> None:
        import httptools  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self.state = state
        self.due: float | None = None  # Of the request on its way.
        self.sent = 0.0
        self.serial = 0
        self.waiting = b""  # What the socket has not taken yet.
        self.closed = False
        self.connected = False
        self.parser = httptools.HttpResponseParser(self)
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if state.stamped:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.came: float | None = None
        code = self.socket.connect_ex(address)
        self.failed_at_once = code not in (0, errno.EINPROGRESS)
        self.fd = self.socket.fileno()
        state.by_fd[self.fd] = self
        state.epoll.register(self.fd, select.EPOLLIN | select.EPOLLOUT)

    def ask(self, due: float, now: float) -> None:
        """Send the next request."""
        state = self.state
        self.due, self.sent = due, now
        state.lag.add(now - due)
        self.serial = state.sent
        request = state.requests[state.sent % len(state.requests)]
        state.sent += 1
        if self.failed_at_once:
            self.end(CONNECTION_ERROR)
            return
        self.waiting = request
        if self.connected:
            self._flush()

    def _flush(self) -> None:
        try:
            taken = self.socket.send(self.waiting)
        except BlockingIOError:
            taken = 0
        except OSError:
            self.end(CONNECTION_ERROR)
            return
        whole = taken == len(self.waiting)
        self.waiting = b"" if whole else self.waiting[taken:]
        if not whole:
            self.state.epoll.modify(self.fd, select.EPOLLIN | select.EPOLLOUT)

    def on_event(self, event: int) -> None:
        """Something happened to the socket."""
        if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            try:
                data = self._receive()
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data:
                try:
                    self.parser.feed_data(data)
                except Exception:  # What came is no HTTP.
                    data = b""
            if data == b"":
                self.end(CONNECTION_ERROR)
                return
        if event & select.EPOLLOUT and not self.closed:
            if not self.connected and self.state.stamped and self.waiting:
                self.sent += self._held_s()
            self.connected = True
            self.state.epoll.modify(self.fd, select.EPOLLIN)
            if self.waiting:
                self._flush()

    def _held_s(self) -> float:
        """How long the connection has stood, its request not sent: this process was late."""
        return max(0.0, (since_s(self.socket, LAST_ACK_RECEIVED) or 0.0) - TICK_S)

    def _receive(self) -> bytes:
        if not self.state.stamped:
            return self.socket.recv(_RECV_BYTES)
        data, beside, _, _ = self.socket.recvmsg(_RECV_BYTES, 64)
        for level, kind, stamp in beside:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _STAMP.unpack(stamp)
                self.came = seconds + 1e-9 * nanoseconds - self.state.clock_offset_s
        return data

    def on_message_complete(self) -> None:
        """Called by the parser: an answer is whole."""
        now, state, due = time.perf_counter(), self.state, self.due
        status = self.parser.get_status_code()
        if due is None:  # An answer to nothing: such as 408 before an idle connection is closed.
            return
        if status == 200:
            state.latency.add(now - due)
            state.service.add(now - self.sent)
            if self.came is not None:
                state.came.add(max(0.0, self.came - self.sent))
        else:
            state.others.add(now - due)
        state.outcomes[str(status)] += 1
        state.ended += 1
        self.due = None
        if self.waiting or not self.parser.should_keep_alive():
            self.close()
        else:
            state.idle.append(self)

    def end(self, outcome: str) -> None:
        """The request on its way, if there is one, gets no answer."""
        if self.due is not None:
            self.due = None
            self.state.outcomes[outcome] += 1
            self.state.ended += 1
        self.close()

    def close(self) -> None:
        """Give the socket back. Twice is allowed."""
        if self.closed:
            return
        self.closed = True
        self.state.by_fd.pop(self.fd, None)
        self.state.epoll.unregister(self.fd)
        self.socket.close()


def generate(
    host: str,
    port: int,
    requests: Sequence[bytes],
    *,
    rate_per_s: float,
    duration_s: float,
    arrivals: Arrivals = "poisson",
    max_connections: int = 1000,
    timeout_s: float = 10.0,
    samples_per_request: int = 1,
    seed: int = 0,
    stamped: bool = False,
    on_second: Callable[[int, int], None] = lambda due, ended: None,
) -> LoadReport:
    """Send ``requests`` in turn at ``rate_per_s`` for ``duration_s`` and wait for what is due.

    Connections are kept alive and used again, the last used first; another is opened when all are
    busy, up to ``max_connections``.

    Args:
        requests: whole HTTP/1.1 requests, head and body.
        arrivals: ``"poisson"``: at random, as many independent clients; ``"fixed"``: evenly.
        timeout_s: from sending, after which a request is unanswered.
        stamped: have the kernel say when answers came (Linux).
        on_second: called about once a second with requests due and ended so far.

    Raises:
        MissingExtraError: ``httptools`` is not installed.
        InputError: a number is not above 0.
        RunError: nothing listens at ``host``:``port``.
    """
    for name, value in (
        ("rate", rate_per_s), ("duration", duration_s), ("timeout", timeout_s),
        ("connections", max_connections),
    ):  # fmt: skip
        if not value > 0:
            raise InputError(f"the {name} of a load must be above 0", got=value)
    try:
        import httptools  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: F401
    except ImportError:
        raise MissingExtraError("the load generator", "httptools", "serve") from None
    family, address = _address(host, port)
    due_times = _due_times(rate_per_s, arrivals, random.Random(seed))
    with select.epoll() as epoll:
        state = _State(requests, epoll, timeout_s, stamped, _clock_offset_s())
        try:
            scheduled, wall_s, most, cpu_s = _run(
                state, family, address, due_times, duration_s, max_connections, on_second
            )
        finally:
            for connection in list(state.by_fd.values()):
                connection.close()
    return LoadReport(
        rate_per_s, duration_s, wall_s, arrivals, samples_per_request, scheduled,
        dict(sorted(state.outcomes.items())), state.latency, state.service, state.came,
        state.others, state.lag, most, cpu_s / wall_s, timeout_s,
    )  # fmt: skip


def _run(
    state: _State,
    family: int,
    address: tuple[Any, ...],
    due_times: Iterator[float],
    duration_s: float,
    max_connections: int,
    on_second: Callable[[int, int], None],
) -> tuple[int, float, int, float]:
    clock, epoll = time.perf_counter, state.epoll
    by_fd, idle = state.by_fd, state.idle
    backlog: collections.deque[float] = collections.deque()
    on_their_way: collections.deque[tuple[float, int, _Connection]] = collections.deque()
    scheduled, most, told = 0, 0, 0
    # epoll waits in whole milliseconds, select on its descriptor in microseconds; but select takes
    # no descriptor that is large, as in a process with thousands of connections of its own.
    fine = epoll.fileno() < _SELECT_LIMIT
    cpu_before, start = time.process_time(), clock()
    due = start + next(due_times)
    end = start + duration_s
    while True:
        now = clock()
        while due <= now and due < end:
            backlog.append(due)
            scheduled += 1
            due = start + next(due_times)
        while backlog:
            while idle and idle[-1].closed:
                idle.pop()
            if idle:
                connection = idle.pop()
            elif len(by_fd) < max_connections:
                connection = _Connection(state, address, family)
                most = max(most, len(by_fd))
            else:
                break
            connection.ask(backlog.popleft(), clock())
            on_their_way.append((now, connection.serial, connection))
        while on_their_way:
            sent, serial, connection = on_their_way[0]
            under_way = connection.due is not None and connection.serial == serial
            if under_way and now - sent < state.timeout_s:
                break
            on_their_way.popleft()
            if under_way:
                connection.end(UNANSWERED)
        if due >= end and not backlog and state.ended == scheduled:
            break
        if backlog and now > end + state.timeout_s:
            # What was sent is still waited for, each for its own time.
            state.outcomes[NOT_SENT] += len(backlog)
            state.ended += len(backlog)
            backlog.clear()
        if now - start > told + 1:
            told = int(now - start)
            state.clock_offset_s = _clock_offset_s()
            on_second(scheduled, state.ended)
        wait = min(max(0.0, (due if due < end else now + 0.05) - now), 0.05)
        if fine:
            select.select([epoll.fileno()], [], [], wait)
            wait = 0.0
        for fd, event in epoll.poll(wait):
            found = by_fd.get(fd)
            if found is not None:
                found.on_event(event)
    return scheduled, clock() - start, most, time.process_time() - cpu_before


def _clock_offset_s() -> float:
    """Time of day less ``perf_counter``; it moves, for the time of day is kept right by steps."""
    looks = []
    for _ in range(5):
        before, of_day, after = time.perf_counter(), time.time(), time.perf_counter()
        looks.append((after - before, of_day - (before + after) / 2))
    return min(looks)[1]


def _address(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """Family and address of a server that takes connections."""
    try:
        with socket.create_connection((host, port), _CONNECT_S) as probe:
            return probe.family, probe.getpeername()
    except OSError as error:
        raise RunError(
            f"a server must listen at {host}:{port}", got=error, next_step="start hotloop serve"
        ) from None


def _due_times(rate_per_s: float, arrivals: str, draw: random.Random) -> Iterator[float]:
    """Seconds from the start at which requests fall due, without an end."""
    at, count = 0.0, 0
    while True:
        if arrivals == "fixed":
            at = count / rate_per_s
            count += 1
        else:
            at += draw.expovariate(rate_per_s)
        yield at


def ramp(
    run: Callable[[float], LoadReport],
    *,
    first_per_s: float,
    factor: float = 1.25,
    enough: float = 0.9,
    max_steps: int = 40,
) -> list[LoadReport]:
    """Raise the rate step by step until two steps in turn answer less than ``enough`` of it.

    The capacity is the most that any step answered (``capacity_per_s``).

    Args:
        run: one stretch of load at a rate.
    """
    reports: list[LoadReport] = []
    rate, short = first_per_s, 0
    while len(reports) < max_steps and short < 2:
        report = run(rate)
        reports.append(report)
        short = short + 1 if report.answered_per_s < enough * rate else 0
        rate *= factor
    return reports


def capacity_per_s(reports: Sequence[LoadReport]) -> float:
    """Requests a second of the step that answered most."""
    return max(report.answered_per_s for report in reports)
