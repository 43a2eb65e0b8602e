"""Reading a binary document field by field, never past its end."""

from __future__ import annotations

from typing import Literal

from ...errors import AttestationError


class Fields:
    """The bytes of one structure, read from the front.

    Args:
        data: all of it.
        what: its name, for messages.
        order: of the bytes of its numbers.
    """

    def __init__(self, data: bytes, what: str, order: Literal["little", "big"]) -> None:
        self._data = data
        self._what = what
        self._order: Literal["little", "big"] = order
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes.

        Raises:
            AttestationError: there are fewer.
        """
        if count > self.left:
            raise AttestationError(
                f"{self._what} must be whole", got=f"{self.left} bytes where {count} must follow"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, size: int) -> int:
        """The next ``size`` bytes as an unsigned number."""
        return int.from_bytes(self.take(size), self._order)

    def sized(self) -> bytes:
        """Two bytes of length, and as many bytes: ``TPM2B`` where the order is big."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def end(self) -> None:
        """Nothing may be left.

        Raises:
            AttestationError: something is.
        """
        if self.left:
            raise AttestationError(
                f"{self._what} must end where its fields end", got=f"{self.left} bytes more"
            )
