"""Challenges that are used once and live for a minute, without a memory of those not yet used."""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable

from ...errors import AttestationError

_RANDOM_BYTES, _TIME_BYTES, _MAC_BYTES = 16, 8, 16
_TIDY_MS = 1000
CHALLENGE_BYTES = _RANDOM_BYTES + _TIME_BYTES + _MAC_BYTES


class Challenges:
    """Makes challenges and takes each back once.

    A challenge carries its own end and a code that only this process can make, so that asking for
    many costs no memory. What is remembered is which were used, until they end.

    Args:
        life_s: seconds from making to the last moment of use.
        clock_s: monotonic seconds.
    """

    def __init__(self, life_s: float = 60.0, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.life_s = life_s
        self._clock_s = clock_s
        self._secret = os.urandom(32)
        self._used: dict[bytes, int] = {}
        self._tidy_at = 0
        self._lock = threading.Lock()

    def make(self) -> bytes:
        """A fresh challenge."""
        ends = int((self._clock_s() + self.life_s) * 1000)
        body = os.urandom(_RANDOM_BYTES) + ends.to_bytes(_TIME_BYTES, "big")
        return body + self._code(body)

    def take(self, challenge: bytes) -> None:
        """Use it; it cannot be used again, whatever comes of it.

        Raises:
            AttestationError: it is not one of ours, too old, or used.
        """
        body, code = challenge[:-_MAC_BYTES], challenge[-_MAC_BYTES:]
        if len(challenge) != CHALLENGE_BYTES or not hmac.compare_digest(code, self._code(body)):
            raise AttestationError("a challenge must be one that this broker made",
                                   next_step="ask for one")  # fmt: skip
        now = int(self._clock_s() * 1000)
        ends = int.from_bytes(body[_RANDOM_BYTES:], "big")
        with self._lock:
            if now >= self._tidy_at:  # Not each time: an asker with much time makes it long.
                self._used = {one: end for one, end in self._used.items() if end >= now}
                self._tidy_at = now + _TIDY_MS
            if ends < now:
                raise AttestationError(f"a challenge must be answered within {self.life_s:g} s",
                                       next_step="ask for another")  # fmt: skip
            if challenge in self._used:
                raise AttestationError("a challenge must be used once",
                                       next_step="ask for another")  # fmt: skip
            self._used[challenge] = ends

    def _code(self, body: bytes) -> bytes:
        return hmac.new(self._secret, body, hashlib.sha256).digest()[:_MAC_BYTES]
