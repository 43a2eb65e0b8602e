"""Fetching the MNIST files from public mirrors: checked, atomic, and quick to give up."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 20.0
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A file as its mirrors publish it.

    Attributes:
        name: last part of the address, and the name it is kept under.
        size_bytes: exact length.
        md5: checksum as torchvision publishes it.
        sha256: checksum as the Keras and TensorFlow loaders publish it.
    """

    name: str
    size_bytes: int
    md5: str
    sha256: str


def fetch(
    files: Sequence[RemoteFile],
    folder: Path,
    mirrors: Sequence[str],
    *,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> str | None:
    """Put all files into a folder; those already there are kept.

    Each file is written beside its name, compared with its length and both checksums, flushed to
    the disk and renamed, so that a file under its name is always whole.

    Args:
        files: what to fetch.
        folder: where to; made if need be.
        mirrors: addresses that end in ``/``, tried in order for each file; one that cannot be
            reached is not tried again.
        connect_timeout_s: for looking up and for connecting to a mirror.

    Returns:
        ``None`` when all files are there, else one line that says why not.
    """
    reasons: dict[str, str] = {}
    for file in files:
        if (folder / file.name).is_file():
            continue
        for mirror in mirrors:
            if mirror in reasons:
                continue
            reason = _fetch_one(file, folder, mirror, connect_timeout_s)
            if reason is None:
                break
            reasons[mirror] = reason
        else:
            return "; ".join(reasons.values()) or "no mirror is known"
    return None


def _fetch_one(file: RemoteFile, folder: Path, mirror: str, connect_timeout_s: float) -> str | None:
    """``None`` when fetched, else why not."""
    address = mirror + file.name
    host = urllib.parse.urlsplit(mirror).netloc
    temporary = None
    try:
        _look_up(address, connect_timeout_s)
        with _opener().open(address, timeout=connect_timeout_s) as response:
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{file.name}-")
            with os.fdopen(handle, "wb") as out:
                wrong = _copy_checked(response, out, file)
                if wrong is not None:
                    return f"{host} sent {file.name} with {wrong}"
                out.flush()
                os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / file.name)
        temporary = None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return f"{host}: {reason}"
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return None


def _copy_checked(response: Any, out: Any, file: RemoteFile) -> str | None:
    """Copy a body; ``None`` when it is the file, else what is wrong with it."""
    # Not for security, and so allowed where MD5 is not: SHA-256 decides.
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    size = 0
    # One byte more than there should be, so that an endless body is noticed and not stored.
    while block := response.read(min(_BLOCK_BYTES, file.size_bytes + 1 - size)):
        size += len(block)
        md5.update(block)
        sha256.update(block)
        out.write(block)
    if size != file.size_bytes:
        more = "more than " if size > file.size_bytes else ""
        return f"{more}{min(size, file.size_bytes)} bytes instead of {file.size_bytes}"
    if sha256.hexdigest() != file.sha256 or md5.hexdigest() != file.md5:
        return "a wrong checksum"
    return None


def _look_up(address: str, timeout_s: float) -> None:
    """Find the host's address in time: a resolver without network may take half a minute."""
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return  # The proxy looks it up.
    outcome: list[OSError | None] = []

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, parts.port or 443)
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=look_up, daemon=True, name="hotloop-lookup")
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TimeoutError(f"no answer about its address in {timeout_s:g} s")
    if outcome[0] is not None:
        raise outcome[0]


class _Http(http.client.HTTPConnection):
    """Gives a slow mirror longer to send than to answer the phone."""

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)


class _Https(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, request)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_HttpHandler, _HttpsHandler)
