"""The other side of the broker, and the client of a server that attests itself."""

from __future__ import annotations

import http.client
import os
import ssl
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ...errors import AttestationError, InputError, RunError
from . import protocol
from .broker import RELEASE
from .certificates import load_certificate
from .policy import Claims, Policy, bind
from .sealing import ReceivingKey, release_info
from .sources import EvidenceSource
from .verifying import verify

_TIMEOUT_S = 30.0
_CHALLENGE_BYTES = 32


def fetch_key(
    url: str, key_id: str, source: EvidenceSource, *, tls: ssl.SSLContext | None = None
) -> bytes:
    """A key, released by the broker at ``url`` to this enclave.

    Args:
        url: ``https://host:port`` of ``hotloop enclave keys serve``.
        key_id: name of the key.
        source: of evidence of what runs here.
        tls: trusted certificates of the broker; ``None``: those of the system.

    Raises:
        AttestationError: the broker refused; its reason is in the message.
        RunError: it cannot be reached, or no evidence can be made here.
        InputError: the URL is none.
    """
    receiving = ReceivingKey()
    answer = _post(url, protocol.CHALLENGE, {}, ("challenge", "life_s"), tls)
    challenge: bytes = answer["challenge"]
    evidence = source.make(bind(RELEASE, challenge, receiving.public_key), receiving.public_key)
    message = {"key": key_id, "kind": source.kind, "challenge": challenge,
               "public_key": receiving.public_key, "evidence": evidence}  # fmt: skip
    answer = _post(url, protocol.RELEASE, message, ("sealed",), tls)
    return receiving.open(answer["sealed"], release_info(key_id, challenge))


def _post(
    url: str, path: str, message: dict[str, Any], names: tuple[str, ...], tls: ssl.SSLContext | None
) -> dict[str, Any]:
    scheme, host, port = split_url(url)
    connection: http.client.HTTPConnection
    if scheme == "https":
        context = tls or ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        return _exchange(connection, path, message, names, url)
    finally:
        connection.close()


def _exchange(
    connection: http.client.HTTPConnection, path: str, message: dict[str, Any],
    names: tuple[str, ...], url: str,
) -> dict[str, Any]:  # fmt: skip
    try:
        connection.request("POST", path, protocol.write(message),
                           {"content-type": "application/json"})  # fmt: skip
        response = connection.getresponse()
        body = response.read(protocol.MAX_BODY_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f"{url} must answer", got=error) from None
    if response.status != 200:
        raise AttestationError(f"{url} refused: {protocol.read_error(body)}", got=response.status)
    return protocol.read(body, names)


def split_url(url: str) -> tuple[str, str, int]:
    """Scheme, host and port.

    Raises:
        InputError: it is not ``http://`` or ``https://`` and a host.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise InputError("a URL must be http://HOST:PORT or https://HOST:PORT", got=url)
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)


class AttestedConnection(http.client.HTTPSConnection):
    """HTTPS to a server that proves what it is before anything else is sent.

    The certificate is not compared with a name or an authority: the evidence is made for the hash
    of its key, so whoever holds the key is what the evidence describes. The proof comes with each
    connection; one that is not accepted is closed.

    Args:
        host, port: of ``hotloop serve --attest``.
        policy: what must run there.
        now_s: seconds since 1970.

    Attributes:
        claims: of the last connection.
    """

    def __init__(
        self,
        host: str,
        port: int,
        policy: Policy,
        *,
        timeout: float = _TIMEOUT_S,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        super().__init__(host, port, timeout=timeout, context=context)
        self._policy = policy
        self._now_s = now_s
        self.claims: Claims | None = None

    def connect(self) -> None:
        """Connect, and have the server prove itself.

        Raises:
            AttestationError: it does not.
            RunError: it cannot be reached.
        """
        self.claims = None
        try:
            super().connect()
        except OSError as error:
            raise RunError(f"{self.host} port {self.port} must answer", got=error) from None
        try:
            self.claims = self._prove()
        except BaseException:
            self.close()
            raise

    def _prove(self) -> Claims:
        assert isinstance(self.sock, ssl.SSLSocket)
        shown = self.sock.getpeercert(binary_form=True) or b""
        certificate = load_certificate(shown, "the server's certificate")
        challenge = os.urandom(_CHALLENGE_BYTES)
        url = f"https://{self.host}:{self.port}"
        # A request may be under way in this object: the proof has another one for the same socket.
        proving = http.client.HTTPConnection(self.host, self.port)
        proving.auto_open = 0
        proving.sock = self.sock
        answer = _exchange(proving, protocol.ATTESTATION, {"challenge": challenge},
                           ("kind", "evidence"), url)  # fmt: skip
        if proving.sock is None:
            raise RunError(f"{url} must keep the connection on which it has proved itself")
        if answer["kind"] != self._policy.kind:
            raise AttestationError(f"the server must attest by {self._policy.kind}",
                                   got=answer["kind"])  # fmt: skip
        nonce = bind(protocol.SERVE, challenge, tls_key(certificate))
        return verify(answer["evidence"], policy=self._policy, nonce=nonce, now_s=self._now_s())


def tls_key(certificate: x509.Certificate) -> bytes:
    """The public key of a server's certificate, as SubjectPublicKeyInfo."""
    key = certificate.public_key()
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
