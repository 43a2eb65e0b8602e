"""The server's proof of what it runs, for clients that ask before they send anything.

Evidence is made for the hash of the TLS key and the client's challenge: whoever holds the key of
the connection is what the evidence describes (``hotloop enclave keys verify``).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..enclave.attestation import bind, protocol
from ..enclave.attestation.certificates import load_certificates
from ..enclave.attestation.client import tls_key
from ..enclave.attestation.sources import EvidenceSource
from ..errors import AttestationError, HotloopError, InputError
from .log import Log
from .message import Refusal, Request, busy

_MAX_WAITING = 16
_CHALLENGE_BYTES = range(16, 65)


class Attester:
    """Answers challenges, one at a time: a TPM takes a tenth of a second for each.

    Args:
        source: of evidence.
        certificate: the server's chain, PEM; its first certificate is the one that is shown.
        log: for what fails.

    Raises:
        InputError: the certificate cannot be read.
    """

    def __init__(self, source: EvidenceSource, certificate: Path, log: Log) -> None:
        try:
            data = certificate.read_bytes()
        except OSError as error:
            raise InputError(f"{certificate} must be readable", got=error.strerror) from None
        first = load_certificates(data, str(certificate))[0]
        self._source = source
        self._key = tls_key(first)
        self._log = log
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="attest")
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, request: Request) -> None:
        """Answer ``POST /attestation``; from the loop's thread.

        Raises:
            Refusal: the body is no challenge, or too many wait.
        """
        try:
            challenge = protocol.read(bytes(request.body), ("challenge",))["challenge"]
        except AttestationError as error:
            raise Refusal(400, str(error)) from None
        if len(challenge) not in _CHALLENGE_BYTES:
            raise Refusal(400, "a challenge must have 16 to 64 bytes")
        if self._waiting >= _MAX_WAITING:
            raise busy(503, "too many ask for evidence", 1.0, "attestation")
        self._waiting += 1  # Now: of requests that come together each must count.
        task = asyncio.get_running_loop().create_task(self._answer(request, challenge))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Request, challenge: bytes) -> None:
        nonce = bind(protocol.SERVE, challenge, self._key)
        try:
            evidence = await asyncio.get_running_loop().run_in_executor(
                self._worker, self._source.make, nonce, b""
            )
        except HotloopError as error:
            self._log.error("no evidence", error=str(error))
            request.refuse(Refusal(500, "the server cannot make evidence"))
        else:
            answer = {"kind": self._source.kind, "evidence": evidence}
            request.answer(200, protocol.write(answer))
        finally:
            self._waiting -= 1
