"""The broker behind HTTP: two paths, small bodies, one line of JSON in the log for each answer."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import socketserver
import ssl
import threading
import time
from typing import Any, TextIO

from ...errors import AttestationError, InputError
from . import protocol
from .broker import Broker

_TIMEOUT_S = 10.0
_LONGEST_S = 30.0  # Of one connection, however slowly it sends.
_MAX_CONNECTIONS = 32


class BrokerServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves one broker until ``shutdown``.

    Args:
        broker: what answers.
        host, port: to listen on; port 0: any that is free.
        log: one line for each answer goes there.
        tls: certificate and key, loaded; ``None``: plain HTTP. Keys are sealed either way.

    Attributes:
        address: ``http://127.0.0.1:8443``.

    Raises:
        InputError: the address cannot be listened on.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, broker: Broker, host: str, port: int, log: TextIO, tls: ssl.SSLContext | None = None
    ) -> None:
        self.broker = broker
        self.log = log
        self._tls = tls
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._log_lock = threading.Lock()
        # One at a time: a verification keeps a CPU busy, and who asks is not known yet.
        self.verifying = threading.Lock()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise InputError(
                "the address must be this machine's and free",
                got=f"{host} port {port}: {error.strerror}",
                next_step="choose another with --port, or 0 for any",
            ) from None
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http{'s' if tls else ''}://{shown}:{self.server_address[1]}"

    def server_bind(self) -> None:
        """Bind, without looking up this host's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it, if one is free; otherwise it is closed at once."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands here, where a slow client keeps nobody else waiting."""
        opened = [request]
        end = threading.Timer(_LONGEST_S, lambda: _cut(opened[-1]))
        end.daemon = True
        end.start()
        try:
            request.settimeout(_TIMEOUT_S)
            if self._tls is not None:
                request.getpeername()  # Gone already: wrapping it would lose the socket.
                opened.append(self._tls.wrap_socket(request, server_side=True,
                                                    do_handshake_on_connect=False))  # fmt: skip
                opened[-1].do_handshake()
            self.finish_request(opened[-1], client_address)
        except (OSError, ValueError):
            pass  # A connection that broke, in any of its stages, is no error of ours.
        finally:
            end.cancel()
            self.shutdown_request(opened[-1])
            self._places.release()

    def write_log(self, **fields: Any) -> None:
        """One line of JSON; never a key, never evidence."""
        line = json.dumps({"time": round(time.time(), 3), **fields})
        with self._log_lock:
            self.log.write(line + "\n")
            self.log.flush()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: BrokerServer
    server_version = "hotloop"
    sys_version = ""
    timeout = _TIMEOUT_S

    def do_POST(self) -> None:
        """Both paths."""
        about: dict[str, Any] = {"path": self.path[:64], "client": self.client_address[0]}
        try:
            status, fields = self._answer(self._body(), about)
        except AttestationError as refusal:
            status, fields = 403, {"error": str(refusal)}
        except _Refused as refusal:
            status, fields = refusal.status, {"error": refusal.text}
        except OSError:
            raise
        except Exception as error:
            status, fields = 500, {"error": "the broker failed on this request"}
            about["failure"] = repr(error)
        if "error" in fields:
            about["refused"] = fields["error"]
        self.server.write_log(status=status, **about)
        body = protocol.write(fields)
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, body: bytes, about: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        broker = self.server.broker
        if self.path == protocol.CHALLENGE:
            protocol.read(body, ())
            challenges = broker.challenges
            return 200, {"challenge": challenges.make(), "life_s": challenges.life_s}
        if self.path != protocol.RELEASE:
            raise _Refused(404, "there is nothing at this path")
        asked = protocol.read(body, ("key", "kind", "challenge", "public_key", "evidence"))
        about |= {"key": asked["key"][:64], "kind": asked["kind"][:16]}
        with self.server.verifying:
            released = broker.release(asked["key"], asked["kind"], asked["challenge"],
                                      asked["public_key"], asked["evidence"])  # fmt: skip
        claims = released.claims
        about |= {"released": True, "signer": claims.signer, "root": claims.root_sha256}
        return 200, {"sealed": released.sealed}

    def _body(self) -> bytes:
        text = self.headers.get("content-length", "")
        if not (text.isdecimal() and len(text) < 10) or "transfer-encoding" in self.headers:
            raise _Refused(411, "a body must come with its length")
        if int(text) > protocol.MAX_BODY_BYTES:
            raise _Refused(413, f"a body has at most {protocol.MAX_BODY_BYTES} bytes")
        body = self.rfile.read(int(text))
        if len(body) != int(text):
            raise _Refused(400, "a body must be whole")
        return body

    def log_message(self, format: str, *args: Any) -> None:
        """The log has its own lines."""


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
