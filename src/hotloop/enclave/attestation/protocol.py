"""The messages between an enclave, a broker and a client: JSON over HTTP, every field checked.

    POST /v1/challenge  {}
         -> {"challenge": base64, "life_s": seconds}
    POST /v1/release    {"key": name, "kind": kind, "challenge", "public_key", "evidence": base64}
         -> {"suite": text, "sealed": base64}
    POST /attestation   {"challenge": base64}                     (of hotloop serve)
         -> {"kind": kind, "evidence": base64}

Anything else: a status from 400 on, and ``{"error": one line}``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from ...errors import AttestationError

CHALLENGE, RELEASE, ATTESTATION = "/v1/challenge", "/v1/release", "/attestation"
MAX_BODY_BYTES = 256 * 1024
_BYTES = ("challenge", "public_key", "evidence", "sealed")
SERVE = "serve"  # What a server's TLS key is for; see ``bind``.


def write(fields: Mapping[str, Any]) -> bytes:
    """A message; bytes go as base64."""
    return json.dumps({
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for name, value in fields.items()
    }).encode()  # fmt: skip


def read(body: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    """A message with exactly these fields: bytes where the protocol has bytes, else texts.

    Raises:
        AttestationError: it is anything else.
    """
    try:
        found = json.loads(body)
        if not isinstance(found, dict) or set(found) != set(names):
            raise ValueError("fields")
        for name, value in found.items():
            if name == "life_s":
                found[name] = float(value)
            elif not isinstance(value, str):
                raise ValueError(name)
            elif name in _BYTES:
                found[name] = base64.b64decode(value, validate=True)
        return found
    except (ValueError, TypeError, RecursionError, binascii.Error, UnicodeDecodeError):
        raise AttestationError(
            f"a message must be JSON with {', '.join(names) or 'no fields'}"
        ) from None


def read_error(body: bytes) -> str:
    """The text of a refusal, whatever the body is."""
    try:
        return str(json.loads(body)["error"])[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "an answer that says nothing"
