"""One sealed file: Tink's AES-GCM-HKDF streaming AEAD, bit for bit.

The construction (Tink, "AES-GCM-HKDF Streaming AEAD"; nonces as in STREAM: Hoang, Reyhanitabar,
Rogaway, Vizar, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO
2015), with the parameters of Tink's template ``AES256_GCM_HKDF_1MB``:

- header: one byte, its length (40); 32 bytes of salt; 7 bytes of nonce prefix; both random;
- key of the file: HKDF-SHA256 of the key, salt, and as info the associated data;
- segments of 1 MiB in the file, the header counted with the first, the last one shorter;
- each by AES-256-GCM with the nonce prefix | number of the segment (4 bytes) | 1 if the last.

So a nonce comes twice only if 32 random bytes do. A segment that is moved, left out or taken from
another file has another nonce or another key; a file that is cut has no last segment. Associated
data says what the file is, and is not stored.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import MissingExtraError, SealedError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEGMENT_BYTES = 1024**2
KEY_BYTES = 32
TAG_BYTES = 16
_PREFIX_BYTES = 7
HEADER_BYTES = 1 + KEY_BYTES + _PREFIX_BYTES
_MAX_SEGMENTS = 2**32
_KEPT_SEGMENTS = 3


def sealed_bytes(plain_bytes: int) -> int:
    """Length of the sealed file that holds so many bytes."""
    room = SEGMENT_BYTES - TAG_BYTES
    segments = max(1, -(-(plain_bytes + HEADER_BYTES) // room))
    return HEADER_BYTES + plain_bytes + segments * TAG_BYTES


class SealedWriter:
    """Seals what is written to it, from the first byte to the last, once.

    Args:
        emit: takes the sealed bytes in order; must have used them when it returns.
        secret: 32 bytes.
        associated_data: what the file is; a reader must name the same.

    Raises:
        MissingExtraError: ``cryptography`` is not installed.
    """

    def __init__(
        self, emit: Callable[[memoryview], None], secret: bytes, associated_data: bytes
    ) -> None:
        salt, self._prefix = os.urandom(KEY_BYTES), os.urandom(_PREFIX_BYTES)
        self._cipher = _cipher(secret, salt, associated_data)
        self._emit = emit
        self._out = memoryview(bytearray(SEGMENT_BYTES))
        self._plain = bytearray(SEGMENT_BYTES - TAG_BYTES)
        self._filled = 0
        self._room = SEGMENT_BYTES - TAG_BYTES - HEADER_BYTES
        self._number = 0
        self._finished = False
        self.plain_bytes = 0
        emit(memoryview(bytes([HEADER_BYTES]) + salt + self._prefix))

    def write(self, data: ReadableBuffer) -> int:
        """Take all of ``data``; whole segments are sealed from where it lies."""
        assert not self._finished, "nothing follows the last segment"
        rest = memoryview(data).cast("B")
        taken = len(rest)
        # The last segment is another one than those before it: one full segment waits until it is
        # known that more follows.
        while len(rest) > self._room - self._filled:
            if self._filled:
                part = self._room - self._filled
                self._plain[self._filled : self._room] = rest[:part]
                self._seal(memoryview(self._plain)[: self._room], last=False)
            else:
                part = self._room
                self._seal(rest[:part], last=False)
            rest = rest[part:]
        self._plain[self._filled : self._filled + len(rest)] = rest
        self._filled += len(rest)
        self.plain_bytes += taken
        return taken

    def finish(self) -> None:
        """Seal the last segment. Without it no reader accepts the file. Twice is allowed."""
        if not self._finished:
            self._seal(memoryview(self._plain)[: self._filled], last=True)
            self._finished = True

    def _seal(self, plain: memoryview, *, last: bool) -> None:
        if self._number >= _MAX_SEGMENTS:
            raise SealedError("a sealed file must have at most 4,294,967,296 segments")
        out = self._out[: len(plain) + TAG_BYTES]
        self._cipher.encrypt_into(_nonce(self._prefix, self._number, last), plain, None, out)
        self._number += 1
        self._filled, self._room = 0, SEGMENT_BYTES - TAG_BYTES
        self._emit(out)


class SealedReader(io.RawIOBase):
    """A sealed file as a stream of its plain bytes, at any place; nothing unverified comes out.

    The last segment is verified when the file is opened, so its length is known to be right.

    Args:
        fd: descriptor of a plain file; closed with the reader.
        secret, associated_data: as when it was written.
        name: for messages.

    Raises:
        SealedError: another key, another file than asked for, damaged or cut.
        MissingExtraError: ``cryptography`` is not installed. OSError: from the system.
    """

    def __init__(self, fd: int, secret: bytes, associated_data: bytes, name: str) -> None:
        super().__init__()
        self._fd, self._name = fd, name
        try:
            self._open(secret, associated_data)
        except BaseException:
            self.close()
            raise

    def _open(self, secret: bytes, associated_data: bytes) -> None:
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            raise SealedError(f"{self._name} must be a plain file")
        self._file_bytes = info.st_size
        if self._file_bytes < HEADER_BYTES + TAG_BYTES:
            raise SealedError(f"{self._name} is cut, or no sealed file")
        header = os.pread(self._fd, HEADER_BYTES, 0)
        if len(header) < HEADER_BYTES or header[0] != HEADER_BYTES:
            raise SealedError(f"{self._name} is damaged, or no sealed file")
        self._prefix = header[1 + KEY_BYTES :]
        self._cipher = _cipher(secret, header[1 : 1 + KEY_BYTES], associated_data)
        self._segments = -(-self._file_bytes // SEGMENT_BYTES)
        last_bytes = self._segment_span(self._segments - 1)[1]
        if last_bytes < TAG_BYTES or self._segments > _MAX_SEGMENTS:
            raise SealedError(f"{self._name} is cut, or damaged at its end")
        self.plain_bytes = self._file_bytes - HEADER_BYTES - self._segments * TAG_BYTES
        self._sealed = memoryview(bytearray())
        # A few segments as plain bytes, the last used first: readers of archives go to and fro
        # between two places, and a read ends inside a segment.
        self._kept: list[tuple[int, memoryview]] = []
        self._at = 0
        self._load(self._segments - 1)

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place in the plain bytes."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.plain_bytes}[whence]
        if base + offset < 0:
            raise OSError(22, "Invalid argument")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer``; fewer bytes only at the end of the file."""
        out = memoryview(buffer).cast("B")
        done = 0
        while done < len(out) and self._at < self.plain_bytes:
            number = (self._at + HEADER_BYTES) // (SEGMENT_BYTES - TAG_BYTES)
            first, size = self._plain_span(number)
            within = self._at - first
            count = min(size - within, len(out) - done)
            if count == size and all(number != kept for kept, _ in self._kept):
                self._decrypt(number, out[done : done + count])
            else:
                out[done : done + count] = self._load(number)[within : within + count]
            done += count
            self._at += count
        return done

    def close(self) -> None:
        """Close the descriptor. Twice is allowed."""
        if not self.closed:
            os.close(self._fd)
        super().close()

    def _segment_span(self, number: int) -> tuple[int, int]:
        """Where a segment begins in the file, and its bytes there."""
        start = number * SEGMENT_BYTES + (HEADER_BYTES if number == 0 else 0)
        return start, min((number + 1) * SEGMENT_BYTES, self._file_bytes) - start

    def _plain_span(self, number: int) -> tuple[int, int]:
        first = number * (SEGMENT_BYTES - TAG_BYTES) - HEADER_BYTES if number else 0
        return first, self._segment_span(number)[1] - TAG_BYTES

    def _load(self, number: int) -> memoryview:
        """A segment as plain bytes, verified."""
        for place, (kept, plain) in enumerate(self._kept):
            if kept == number:
                self._kept.insert(0, self._kept.pop(place))
                return plain
        size = self._plain_span(number)[1]
        plain = memoryview(bytearray())
        if len(self._kept) >= _KEPT_SEGMENTS:
            plain = self._kept.pop()[1]
        if len(plain) < size:
            plain = memoryview(bytearray(size))
        self._decrypt(number, plain[:size])
        self._kept.insert(0, (number, plain))
        return plain

    def _decrypt(self, number: int, out: memoryview) -> None:
        from cryptography.exceptions import InvalidTag

        start, size = self._segment_span(number)
        if len(self._sealed) < size:
            self._sealed = memoryview(bytearray(size))
        sealed = self._sealed[:size]
        got = 0
        while got < size:
            taken = os.preadv(self._fd, [sealed[got:]], start + got)
            if taken == 0:
                raise SealedError(f"{self._name} became shorter while it was read")
            got += taken
        last = number == self._segments - 1
        try:
            self._cipher.decrypt_into(_nonce(self._prefix, number, last), sealed, None, out)
        except InvalidTag:
            raise SealedError(
                f"{self._name} was sealed with another key or as another file, or is damaged",
                got=f"segment {number} of {self._segments}, which does not verify",
                next_step="pass its own key, keep its name, or fetch it again",
            ) from None


def _nonce(prefix: bytes, number: int, last: bool) -> bytes:
    return prefix + number.to_bytes(4, "big") + bytes([last])


def _cipher(secret: bytes, salt: bytes, associated_data: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError:
        raise MissingExtraError("a sealed file", "cryptography", "enclave") from None
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt, associated_data).derive(secret))
