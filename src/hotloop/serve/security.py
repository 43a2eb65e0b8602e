"""Who may connect: tokens, TLS, names of the host, and what may be exposed at all."""

from __future__ import annotations

import hmac
import ssl
from pathlib import Path

from ..errors import InputError
from ..listening import is_loopback, load_certificate
from .message import Refusal

_MIN_TOKEN = 16
_MAX_TOKEN_FILE_BYTES = 64 * 1024


class Tokens:
    """The tokens of a file, one a line; any of them opens the server.

    Several make it possible to change them without a moment in which neither works.

    Raises:
        InputError: the file cannot be read, is empty, or a token is short or not plain ASCII.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokens = self._read()

    def reload(self) -> None:
        """Read the file again."""
        self._tokens = self._read()

    def allows(self, authorization: bytes) -> bool:
        """Whether ``Authorization`` holds one of them; takes as long for any wrong one."""
        scheme, _, given = authorization.partition(b" ")
        found = False
        for token in self._tokens:
            found |= hmac.compare_digest(token, given.strip())
        return found and scheme.lower() == b"bearer"

    def _read(self) -> tuple[bytes, ...]:
        try:
            with self.path.open("rb") as file:
                raw = file.read(_MAX_TOKEN_FILE_BYTES + 1)
        except OSError as error:
            raise InputError("the token file must be readable", got=error.strerror) from None
        tokens = tuple(line.strip() for line in raw.splitlines() if line.strip())
        good = all(len(t) >= _MIN_TOKEN and t.isascii() and b" " not in t for t in tokens)
        if len(raw) > _MAX_TOKEN_FILE_BYTES or not tokens or not good:
            # The message must not show what is in the file.
            raise InputError(
                f"the token file must have one token a line, each at least {_MIN_TOKEN} characters "
                "of ASCII without spaces",
                next_step="openssl rand -hex 32 > token; chmod 600 token",
            )
        return tokens


def check_exposure(host: str, *, tls: bool, tokens: bool, insecure: bool) -> None:
    """An address that others can reach needs TLS or a token.

    Raises:
        InputError: it has neither, and nobody said that this is meant.
    """
    if not (is_loopback(host) or tls or tokens or insecure):
        raise InputError(
            "a host that is not loopback needs --tls-cert and --tls-key, or --token-file",
            got=host,
            next_step="add them, or --insecure if the network is trusted",
        )


def tls_context(cert: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or newer with this certificate.

    Raises:
        InputError: the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, cert, key)
    return context


def host_name(host: bytes) -> bytes:
    """``Host`` without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith(b"["):
        return host.partition(b"]")[0] + b"]"
    return host.partition(b":")[0]


def check_host(headers: dict[bytes, bytes], allowed: frozenset[bytes] | None) -> None:
    """Keep pages of other sites away from a server that trusts this machine.

    A page can send requests to the loopback interface from a visitor's browser. Its own name is
    then in ``Origin``, or, where it has made its name point here, in ``Host``. Probes of load
    balancers in HTTP/1.0 name no host; a browser always does.

    Raises:
        Refusal: the host is not one of ``allowed``, or the request comes from another site's page.
    """
    host = headers.get(b"host", b"")
    if allowed is not None and b"host" in headers and host_name(host) not in allowed:
        raise Refusal(421, "the server is not known by this name", reason="host")
    origin = headers.get(b"origin")
    if origin is not None and origin.partition(b"://")[2].lower() != host.strip().lower():
        raise Refusal(403, "requests from pages of other sites are not served", reason="origin")
