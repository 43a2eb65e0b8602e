"""What servers here share: who can reach an address, and the certificate that TLS shows."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from .errors import InputError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_certificate(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Let TLS show this certificate, whose key has no password.

    Raises:
        InputError: the files cannot be used.
    """
    try:
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            "the certificate and its key must be PEM files that belong together",
            got=getattr(error, "reason", None) or error.strerror,
        ) from None
