"""Output to terminals and files that cannot show every character: no command fails for that."""

from __future__ import annotations

import codecs
import io
import sys

_NAME = "hotloop-output"


def write_any_character() -> None:
    """From now on what standard output and error cannot show is written as an escape.

    Bytes of names that Python could not read in this locale are written as they were.
    """
    codecs.register_error(_NAME, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _replaced(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = b""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        is_byte = 0xDC80 <= code <= 0xDCFF
        found += (
            bytes([code - 0xDC00]) if is_byte else character.encode("ascii", "backslashreplace")
        )
    return found, error.end
