"""A request as it came and an answer as it goes out."""

from __future__ import annotations

import http
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson

JSON = b"application/json"
BINARY = b"application/octet-stream"
TEXT = b"text/plain; charset=utf-8"
HTML = b"text/html; charset=utf-8"

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
    for status in http.HTTPStatus
}
_FIXED = b"server: hotloop\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\n"


class Refusal(Exception):
    """A request is answered with an error; nothing in ``text`` comes from inside the server.

    Args:
        status: of HTTP.
        text: for the client.
        headers: more of the answer.
        close: the connection cannot be used any more.
        reason: label in the metrics; ``None``: the status alone says it.
    """

    def __init__(
        self,
        status: int,
        text: str,
        *,
        headers: Sequence[tuple[bytes, bytes]] = (),
        close: bool = False,
        reason: str | None = None,
    ) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
        self.headers = tuple(headers)
        self.close = close
        self.reason = reason


def busy(status: int, text: str, retry_after_s: float, reason: str) -> Refusal:
    """429 or 503 with the time after which trying again makes sense."""
    seconds = max(1, min(3600, int(retry_after_s + 0.999)))
    return Refusal(status, text, headers=[(b"retry-after", str(seconds).encode())], reason=reason)


class Client(Protocol):
    """Who sent a request and takes its answer; see ``Connection``."""

    def answer(
        self,
        request: Request,
        status: int,
        body: bytes,
        content_type: bytes,
        headers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        """Send the answer."""


class Request:
    """One request, whole; answered once, from the loop's thread.

    Attributes:
        method, path, query: of the request line; the path is not decoded.
        headers: names in lower case.
        is_old: the client speaks HTTP/1.0: a connection is kept only where it asked for that.
        body: all of it.
        arrived_s: monotonic seconds at which its first byte came, see ``ConnectionManager``.
        on_whole: called with it once its body is whole, or will not be.
        on_gone: called if the client goes before it is answered.
    """

    __slots__ = (
        "answered",
        "arrived_s",
        "body",
        "client",
        "error",
        "handler",
        "headers",
        "is_old",
        "keep_alive",
        "method",
        "on_gone",
        "on_whole",
        "path",
        "query",
        "route",
    )

    def __init__(self, client: Client, method: bytes, path: bytes, query: bytes,
                 headers: dict[bytes, bytes], arrived_s: float) -> None:  # fmt: skip
        self.client = client
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.arrived_s = arrived_s
        self.body: bytes | bytearray = b""
        self.keep_alive = True
        self.is_old = False
        self.error: Refusal | None = None
        self.answered = False
        self.on_whole: Callable[[Request], None] | None = None
        self.on_gone: Callable[[], None] | None = None
        self.route = "other"
        self.handler: Callable[[Request], None] | None = None

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: bytes = JSON,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Send the answer."""
        self.client.answer(self, status, body, content_type, headers)

    def answer_json(self, document: Any, status: int = 200) -> None:
        """Send a document."""
        self.answer(status, orjson.dumps(document))

    def refuse(self, refusal: Refusal) -> None:
        """Send an error, in the protocol's form."""
        if refusal.close:
            self.keep_alive = False
        # Its traceback holds the frames, these the request and its body: a circle that only the
        # collector would break, and under overload it comes too late for tens of megabytes.
        refusal.__traceback__ = refusal.__context__ = None
        self.error = refusal
        body = orjson.dumps({"error": refusal.text})
        self.answer(refusal.status, body, JSON, refusal.headers)

    @property
    def age_s(self) -> float:
        """Seconds since its first byte."""
        return time.monotonic() - self.arrived_s


def head(
    status: int,
    length: int,
    content_type: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    keep_alive: bool,
    is_old: bool = False,
) -> bytes:
    """Status line and headers of an answer; ``is_old``: to an HTTP/1.0 client.

    HTTP/1.1 keeps a connection unless told otherwise, HTTP/1.0 closes it (RFC 9112, 9.3).
    """
    more = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    if keep_alive:
        last = b"connection: keep-alive\r\n\r\n" if is_old else b"\r\n"
    else:
        last = b"connection: close\r\n\r\n"
    return b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b" % (
        _STATUS_LINES[status], _FIXED, content_type, length, more, last,
    )  # fmt: skip


def split_target(target: bytes) -> tuple[bytes | None, bytes, bytes]:
    """Host, path and query of a request's target.

    Clients of a proxy send the whole address; its host then stands before that of the ``Host``
    field (RFC 9112, 3.2.2). ``None``: the target is a path alone.

    Raises:
        Refusal: the address is of no server.
    """
    host: bytes | None = None
    if not target.startswith(b"/") and b"://" in target:
        scheme, _, rest = target.partition(b"://")
        at = min(at for at in (rest.find(b"/"), rest.find(b"?"), len(rest)) if at >= 0)
        host, target = rest[:at], rest[at:]
        if scheme.lower() not in (b"http", b"https") or not host or b"@" in host:
            raise Refusal(400, "the target of the request is no address of a server", close=True)
        if not target.startswith(b"/"):
            target = b"/" + target
    path, _, query = target.partition(b"?")
    return host, path, query
