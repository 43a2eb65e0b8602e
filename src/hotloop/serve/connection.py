"""One connection: bytes to requests, under limits, and answers back in order.

The parser is llhttp (``httptools``), sockets and TLS are the loop's (``uvloop``). What is ours is
the state between them, because the limits live there: how long a client may take for headers and
body, how much it may send before it is refused, and that an idle one costs almost nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import httptools

from .connection_manager import ConnectionManager
from .limits import Limits
from .message import Refusal, Request, busy, head, split_target

_NEVER = float("inf")
_MAX_PIECES = 64
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _Stop(Exception):
    """Nothing more of this connection is read."""


class Connection(asyncio.BufferedProtocol):
    """One client. All methods run in the loop's thread.

    Attributes:
        due_at: monotonic seconds at which ``time_is_up``.
    """

    __slots__ = (
        "_active",
        "_body",
        "_chunks",
        "_earliest_s",
        "_fed_bytes",
        "_headers",
        "_held_bytes",
        "_in_headers",
        "_manager",
        "_offers_upgrade",
        "_owes_continue",
        "_parser",
        "_paused",
        "_pieces",
        "_queue",
        "_receiving",
        "_refusal",
        "_request",
        "_size",
        "_started_s",
        "_stopped",
        "_target",
        "_transport",
        "_turn",
        "due_at",
    )  # fmt: skip

    def __init__(self, manager: ConnectionManager) -> None:
        self._manager = manager
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None  # Made with the first byte: idle connections are many.
        self._active: Request | None = None  # The request that is being answered.
        self._queue: deque[Request] | None = None  # Whole requests behind it.
        self._request: Request | None = None  # The request whose body is being read.
        self._offers_upgrade = False  # The headers that were read last do.
        self._owes_continue = False  # The client asks before it sends its body.
        self._receiving = False  # From the first byte of a request to its last.
        self._in_headers = False
        self._fed_bytes = 0  # Since the last whole request.
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._size = 0
        self._body: bytes | bytearray = b""
        self._pieces: list[bytes] | None = None  # Of the body, behind ``_body``.
        self._held_bytes = 0
        self._chunks = 0
        self._refusal: Refusal | None = None
        self._started_s = 0.0
        # What it sends at once is found by the next look and has waited for as long as this one.
        self._earliest_s = manager.earliest_arrival_s()
        self._turn = manager.turn + 1
        self._stopped = False
        self._paused = False
        self.due_at = _NEVER

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = cast(asyncio.Transport, transport)
        manager = self._manager
        self.due_at = time.monotonic() + manager.limits.header_timeout_s
        full = len(manager.connections) >= manager.max_connections
        if full and not manager.make_room():
            self._transport.write(
                b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
                b"content-length: 0\r\n\r\n"
            )
            self._stopped = True
            self._transport.close()
            return
        manager.connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; whatever it waited for need not be computed."""
        self._manager.connections.pop(self, None)
        self._stopped = True
        self._release(self._held_bytes)
        self._held_bytes = 0
        if self._request is not None and self._request.on_whole is not None:
            self._request.on_whole(self._request)
        waiting = [*([self._active] if self._active else []), *(self._queue or ())]
        self._active, self._queue, self._request, self._parser = None, None, None, None
        self._body, self._pieces = b"", None
        for request in waiting:
            self._release(len(request.body))
            self._manager.unanswered -= 1
            request.answered = True
            on_gone, request.on_gone = request.on_gone, None
            if on_gone is not None:
                on_gone()

    def pause_writing(self) -> None:
        """The client reads slowly: it is not read from either until it has caught up."""
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self.due_at = time.monotonic() + self._manager.limits.write_timeout_s

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self._set_due()
        self._next()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the loop reads to: one place for all, because it is empty again after each read."""
        return self._manager.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes of one request, of several, or of part of one."""
        self._feed(self._manager.read_buffer[:nbytes])

    def _feed(self, data: memoryview) -> None:
        if self._stopped:
            return
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
        earliest_s = self._manager.earliest_arrival_s()
        if self._turn < self._manager.turn:
            self._earliest_s = earliest_s
        if self._fed_bytes == 0 and self._active is None and not self._receiving:
            self.due_at = time.monotonic() + self._manager.limits.header_timeout_s
            self._in_headers = True
        self._fed_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if isinstance(error, httptools.HttpParserCallbackError):
                if not isinstance(error.__context__, _Stop):
                    raise
            else:
                self._refusal = Refusal(400, "this is not an HTTP/1.1 request", close=True)
            if not self._stopped:
                assert self._refusal is not None
                self._fail(self._refusal)
            return
        limits = self._manager.limits
        if self._in_headers and self._fed_bytes > limits.max_header_bytes:
            # Checked here too: the parser keeps an unfinished header to itself.
            self._fail(_too_many_header_bytes(limits))
        elif self._fed_bytes > limits.max_header_bytes + limits.max_body_bytes + (
            64 * limits.max_chunks
        ):
            self._fail(Refusal(413, "the request is too large", close=True))

    def _parse(self, data: memoryview) -> None:
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade()
                data = data[offer.args[0] :]

    def _decline_upgrade(self) -> None:
        """Go on as if no other protocol had been offered (RFC 9110, 7.8): Java's client offers
        HTTP/2. The parser took the end of the headers for the end of HTTP, so another one reads
        them again, without the offer.
        """
        fields = [(k, v) for k, v in self._headers.items() if k != b"upgrade"]
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        first = b"%b %b HTTP/%b\r\n" % (method, self._target, version)
        top = first + b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"
        self._offers_upgrade = False
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(top)

    # --- the parser's side

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        queued = len(self._queue) if self._queue else 0
        if queued >= self._manager.limits.max_pipelined or self._stopped:
            # What was sent ahead of this is answered, then the connection is closed.
            self._stopped = True
            last = self._queue[-1] if self._queue else self._active
            if last is not None:
                last.keep_alive = False
            raise _Stop
        self._receiving = self._in_headers = True
        self._started_s = self._manager.arrival_s(
            self._transport, self._earliest_s, is_first=not self._started_s
        )
        self._target, self._headers, self._size = b"", {}, 0
        self._body, self._pieces, self._chunks, self._refusal = b"", None, 0, None
        self._request = None

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._count(len(url))
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field; after the body they are trailers and only counted."""
        self._count(len(name) + len(value or b"") + 4)
        if not self._in_headers:
            return
        name, value = name.lower(), (value or b"").strip()
        headers = self._headers
        if name in headers:
            if name in (b"host", b"content-length", b"transfer-encoding", b"authorization",
                        b"inference-header-content-length", b"origin"):  # fmt: skip
                self._raise(Refusal(400, f"{name.decode()} must be given once", close=True))
            value = headers[name] + b", " + value
        headers[name] = value
        if len(headers) > self._manager.limits.max_headers:
            self._raise(
                Refusal(431, f"at most {self._manager.limits.max_headers} headers", close=True)
            )

    def on_headers_complete(self) -> None:
        """All that is needed to refuse a body before it is read."""
        limits, headers = self._manager.limits, self._headers
        self._in_headers = False
        self._size = 0
        method, version = self._parser.get_method(), self._parser.get_http_version()
        self._offers_upgrade = self._parser.should_upgrade() and method != b"CONNECT"
        if self._offers_upgrade:
            return
        try:
            host, path, query = split_target(self._target)
        except Refusal as refusal:
            self._raise(refusal)
        if host is not None and b"host" in headers:
            headers[b"host"] = host
        request = Request(self, method, path, query, headers, self._started_s)
        request.keep_alive = self._parser.should_keep_alive() and not self._manager.draining
        request.is_old = version == "1.0"
        self._request = request
        if self._active is None:
            self.due_at = time.monotonic() + limits.body_timeout_s
        if version not in ("1.0", "1.1"):
            self._raise(Refusal(505, "HTTP/1.1 is served", close=True))
        self._check_framing(request)
        try:
            length = int(headers.get(b"content-length", b"0"))
        except ValueError:
            length = 0  # The parser has refused it already.
        if length > limits.max_body_bytes:
            self._raise(_body_too_large(limits))
        try:
            self._manager.gate(request)
        except Refusal as refusal:
            if refusal.close or b"expect" in headers:
                # A client that asks first does not send the body of a request that is refused.
                refusal.close = True
                self._raise(refusal)
            self._refusal = refusal
        else:
            if headers.get(b"expect", b"").lower() == b"100-continue" and not request.is_old:
                self._owes_continue = True
                self._continue()

    def _check_framing(self, request: Request) -> None:
        """Refuse a body of which nobody can say where it ends, or that comes encoded."""
        coding = request.headers.get(b"transfer-encoding")
        if request.method == b"CONNECT":
            self._raise(Refusal(405, "this is no proxy", close=True))
        if coding is not None and request.is_old:
            self._raise(Refusal(400, "HTTP/1.0 has no Transfer-Encoding", close=True))
        if coding is not None and coding.lower() != b"chunked":
            self._raise(Refusal(501, "the only Transfer-Encoding is chunked", close=True))

    def _continue(self) -> None:
        """Ask for the body, once it is its turn: not in the middle of an earlier answer."""
        if self._owes_continue and self._active is None and not self._queue:
            self._owes_continue = False
            assert self._transport is not None
            self._transport.write(_CONTINUE)

    def on_chunk_header(self) -> None:
        """A part of a chunked body begins."""
        self._chunks += 1
        if self._chunks > self._manager.limits.max_chunks:
            self._raise(
                Refusal(
                    413, f"a body has at most {self._manager.limits.max_chunks} chunks", close=True
                )
            )

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        manager = self._manager
        self._size += len(body)
        if self._refusal is None:
            self._held_bytes += len(body)
            manager.buffered_bytes += len(body)
            if not self._body:
                self._body = body  # Most bodies come whole: no copy.
            else:
                self._add_piece(body)
            if manager.buffered_bytes > manager.limits.max_buffered_bytes:
                self._drop_body()
                self._refusal = busy(503, "too much is waiting", 1.0, "buffered bytes")
        if self._size > manager.limits.max_body_bytes:
            self._raise(_body_too_large(manager.limits))

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._offers_upgrade:
            return
        request = self._request
        assert request is not None
        self._request = None
        self._fed_bytes = 0
        self._receiving = self._owes_continue = False
        if self._pieces:
            self._body = b"".join([self._body, *self._pieces])
            self._pieces = None
        request.body, self._body = self._body, b""
        request.error = self._refusal
        if request.on_whole is not None:
            request.on_whole(request)
        self._held_bytes -= len(request.body)
        self._enqueue(request)

    # --- answers

    def answer(
        self,
        request: Request,
        status: int,
        body: bytes,
        content_type: bytes,
        headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        """Send the answer to the active request and go on with the next."""
        if request.answered:
            return
        request.answered = True
        request.on_gone = None
        self._manager.unanswered -= 1
        self._release(len(request.body))
        request.body = b""
        transport = self._transport
        assert transport is not None
        keep = request.keep_alive and not self._manager.draining
        is_old = request.is_old
        first = head(status, len(body), content_type, headers, keep_alive=keep, is_old=is_old)
        if request.method == b"HEAD":
            body = b""
        if transport.is_closing():
            pass
        elif len(body) < 65_536:
            transport.write(first + body)
        else:
            transport.writelines([first, body])
        self._manager.on_answer(request, status)
        self._active = None
        if not keep:
            self._stopped = True
            self._linger()
            return
        if self._queue:
            # Not from here: a long line of answered requests would be a deep stack.
            asyncio.get_running_loop().call_soon(self._next)
            return
        self._set_due()
        self._continue()

    def _enqueue(self, request: Request) -> None:
        self._manager.unanswered += 1
        if self._active is None and not self._queue and not self._paused:
            self._start(request)
        else:
            if self._queue is None:
                self._queue = deque()
            self._queue.append(request)

    def _next(self) -> None:
        # Nothing is computed for a client that does not read what it has been sent.
        if self._active is None and self._queue and not self._paused:
            self._start(self._queue.popleft())

    def _start(self, request: Request) -> None:
        self._active = request
        self.due_at = _NEVER
        if request.error is not None:
            request.refuse(request.error)
        else:
            self._manager.handle(request)

    # --- time

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being received or answered."""
        return (
            self._active is None
            and not self._receiving
            and self._fed_bytes == 0
            and not self._paused
            and not self._stopped
        )

    @property
    def has_unsent(self) -> bool:
        """Whether some of an answer has not been taken by the client's side yet."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def time_is_up(self) -> None:
        """Called once ``due_at`` has passed."""
        assert self._transport is not None
        if self._transport.is_closing() or self._paused or self._stopped:
            self.due_at = _NEVER
            self._transport.abort()
        elif self._fed_bytes == 0 and not self._receiving:
            self.close()
        else:
            what = "headers" if self._in_headers else "body"
            self._fail(Refusal(408, f"the {what} took too long", close=True, reason="slow client"))

    def close(self) -> None:
        """Close after what was written has been sent."""
        assert self._transport is not None
        self._stopped = True
        self.due_at = time.monotonic() + self._manager.limits.write_timeout_s
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def _set_due(self) -> None:
        if self._active is not None or self._paused:
            return
        limits = self._manager.limits
        now = time.monotonic()
        if self._fed_bytes == 0 and not self._receiving:
            self.due_at = now + limits.idle_timeout_s
        elif self._in_headers:
            self.due_at = now + limits.header_timeout_s
        else:
            self.due_at = now + limits.body_timeout_s

    # --- refusing

    def _linger(self) -> None:
        """Close, but give the answer time to be read: a reset would throw it away."""
        transport = self._transport
        assert transport is not None
        if transport.can_write_eof():
            most = self._manager.limits.write_timeout_s
            wait_s = most if self.has_unsent else min(1.0, most)
            self.due_at = time.monotonic() + wait_s
            transport.write_eof()
        else:
            self.close()

    def _fail(self, refusal: Refusal) -> None:
        """Refuse what is being received; requests before it are answered first."""
        self._drop_body()
        request = self._request
        if request is not None and request.on_whole is not None:
            request.on_whole(request)
        if request is None:
            request = Request(self, b"GET", b"", b"", {}, self._started_s or time.monotonic())
        request.error = refusal
        request.keep_alive = False
        self._request = None
        self._fed_bytes = 0
        self._receiving = False
        self._stopped = True
        self._enqueue(request)

    def _raise(self, refusal: Refusal) -> None:
        """Out of the parser's callbacks."""
        self._refusal = refusal
        raise _Stop

    def _count(self, size: int) -> None:
        self._size += size if self._in_headers else 0
        if self._in_headers and self._size > self._manager.limits.max_header_bytes:
            self._raise(_too_many_header_bytes(self._manager.limits))

    def _add_piece(self, body: bytes) -> None:
        """Pieces are joined once, at the end: to let thousands of bodies grow scatters the heap."""
        if self._pieces is None:
            self._pieces = []
        self._pieces.append(body)
        if len(self._pieces) == _MAX_PIECES:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += b"".join(self._pieces)
            self._pieces = None

    def _drop_body(self) -> None:
        self._release(self._held_bytes)
        self._held_bytes = 0
        self._body, self._pieces = b"", None

    def _release(self, size: int) -> None:
        self._manager.buffered_bytes -= size


def _too_many_header_bytes(limits: Limits) -> Refusal:
    return Refusal(431, f"the headers have at most {limits.max_header_bytes} bytes", close=True)


def _body_too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the body has at most {limits.max_body_bytes} bytes", close=True)
