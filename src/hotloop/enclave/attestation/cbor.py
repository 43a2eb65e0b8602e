"""The part of CBOR (RFC 8949) that attestation needs: no tags but one, no floats, no surprises."""

from __future__ import annotations

from typing import Any

from ...errors import AttestationError

_MAX_DEPTH = 8
_MAX_ITEMS = 256
_BREAK = object()
_SIMPLE = {20: False, 21: True, 22: None}


def decode(data: bytes, what: str, *, tag: int | None = None) -> Any:
    """The one value that ``data`` is: numbers, bytes, texts, lists, dicts, booleans, ``None``.

    Args:
        data: all of it.
        what: its name, for messages.
        tag: that may stand before the value.

    Raises:
        AttestationError: anything else, a key twice, or more behind it.
    """
    reader = _Reader(data, what)
    if tag is not None and data[:1] == bytes([0xC0 | tag]):
        reader.at = 1
    value = reader.value(0)
    if value is _BREAK or reader.at != len(data):
        raise reader.refused("must end where its value ends")
    return value


def encode(value: Any) -> bytes:
    """The same kinds of values, each in its shortest form; dicts keep their order."""
    if value is None or isinstance(value, bool):
        return bytes([0xE0 | {False: 20, True: 21, None: 22}[value]])
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    if isinstance(value, list | tuple):
        return _head(4, len(value)) + b"".join(encode(one) for one in value)
    if isinstance(value, dict):
        pairs = [encode(key) + encode(one) for key, one in value.items()]
        return _head(5, len(value)) + b"".join(pairs)
    raise TypeError(f"CBOR of {type(value).__name__}")


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    size = 1 if number < 1 << 8 else 2 if number < 1 << 16 else 4 if number < 1 << 32 else 8
    return bytes([major << 5 | {1: 24, 2: 25, 4: 26, 8: 27}[size]]) + number.to_bytes(size, "big")


class _Reader:
    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.what = what
        self.at = 0

    def refused(self, why: str) -> AttestationError:
        return AttestationError(f"{self.what} {why}", got=f"CBOR at byte {self.at}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.refused("must be whole")
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self, depth: int) -> Any:
        """The next value; ``_BREAK``: the end of one without a length."""
        if depth > _MAX_DEPTH:
            raise self.refused(f"must be at most {_MAX_DEPTH} levels deep")
        first = self.take(1)[0]
        major, low = first >> 5, first & 31
        if first == 0xFF:
            return _BREAK
        if major == 7:
            if low not in _SIMPLE:
                raise self.refused("must have no floats and no unknown values")
            return _SIMPLE[low]
        if low == 31 and major in (4, 5):
            count = None
        elif low < 24:
            count = low
        elif low < 28:
            size = 1 << (low - 24)
            count = int.from_bytes(self.take(size), "big")
            if _head(0, count)[1:] != self.data[self.at - size : self.at]:
                raise self.refused("must have its numbers in their shortest form")
        else:
            raise self.refused("must have strings of known length")
        return self.body(major, count, depth)

    def body(self, major: int, count: int | None, depth: int) -> Any:
        if count is not None:
            if major == 0:
                return count
            if major == 1:
                return -1 - count
            if major == 2:
                return self.take(count)
            if major == 3:
                try:
                    return self.take(count).decode()
                except UnicodeDecodeError:
                    raise self.refused("must have texts in UTF-8") from None
            if major == 6:
                raise self.refused("must have no tags")
            if count > _MAX_ITEMS:
                raise self.refused(f"must have at most {_MAX_ITEMS} values in one")
        return self.items(count, depth) if major == 4 else self.pairs(count, depth)

    def items(self, count: int | None, depth: int) -> list[Any]:
        found: list[Any] = []
        while count is None or len(found) < count:
            one = self.value(depth + 1)
            if one is _BREAK and count is None:
                return found
            if one is _BREAK or len(found) == _MAX_ITEMS:
                raise self.refused("must have lists that end")
            found.append(one)
        return found

    def pairs(self, count: int | None, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        while count is None or len(found) < count:
            key = self.value(depth + 1)
            if key is _BREAK and count is None:
                return found
            if key is _BREAK or len(found) == _MAX_ITEMS or type(key) not in (int, str):
                raise self.refused("must have numbers or texts as keys")
            one = self.value(depth + 1)
            if one is _BREAK or key in found:
                raise self.refused("must have each key once, with a value")
            found[key] = one
        return found
