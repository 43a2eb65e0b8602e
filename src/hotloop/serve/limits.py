"""What one client, and all of them together, may take. Every limit holds before memory is taken."""

from __future__ import annotations

import resource
from dataclasses import dataclass, fields

from ..errors import InputError

MIB = 1024 * 1024
# Files, sockets of the loop, and what the engine opens.
_SPARE_DESCRIPTORS = 64


@dataclass(frozen=True)
class Limits:
    """Limits of the server.

    Attributes:
        max_header_bytes: request line and headers together.
        max_headers: fields in one request.
        max_body_bytes: one body.
        max_json_bytes: the part of a body that is JSON.
        max_json_depth: brackets inside brackets.
        max_chunks: parts of a chunked body.
        max_buffered_bytes: bodies of all requests together, until they are answered.
        max_connections: open at once; beyond, the idle ones make room.
        max_pipelined: requests one connection may send ahead of the answers.
        max_rows: rows of one request.
        max_rank: dimensions of a tensor.
        header_timeout_s: from the first byte of a request (or the connection) to its last header.
        body_timeout_s: from the last header to the last byte of the body.
        idle_timeout_s: between two requests.
        write_timeout_s: for a client that does not read its answer.
    """

    max_header_bytes: int = 16 * 1024
    max_headers: int = 64
    max_body_bytes: int = 64 * MIB
    max_json_bytes: int = 8 * MIB
    max_json_depth: int = 32
    max_chunks: int = 16_384
    max_buffered_bytes: int = 256 * MIB
    max_connections: int = 16_384
    max_pipelined: int = 16
    max_rows: int = 4096
    max_rank: int = 8
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 60.0
    write_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise InputError(f"{field.name} must be above 0", got=value)


def raise_descriptor_limit(max_connections: int) -> int:
    """Let this process open as many sockets as the system allows; returns how many it may serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            soft = target
        except (OSError, ValueError):
            pass
    if soft == resource.RLIM_INFINITY:
        return max_connections
    return max(1, min(max_connections, soft - _SPARE_DESCRIPTORS))
