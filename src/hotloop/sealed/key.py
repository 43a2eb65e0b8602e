"""A key, and the places it may be read from: never a command line, which everybody can list."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import stat
import sys
from pathlib import Path

from ..errors import InputError, StorageError
from .stream import KEY_BYTES

DESCRIPTOR = "HOTLOOP_KEY_FD"
_TEXT = re.compile(rb"[0-9a-f]{64}\n?")


class SealingKey:
    """32 bytes that seal and unseal; never shown.

    Raises:
        InputError: not 32 bytes.
    """

    __slots__ = ("secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise InputError(f"a key must have {KEY_BYTES} bytes", got=f"{len(secret)} bytes")
        self.secret = bytes(secret)

    def __repr__(self) -> str:
        return "SealingKey(...)"

    @classmethod
    def new(cls) -> SealingKey:
        """A key from the system's random numbers."""
        return cls(os.urandom(KEY_BYTES))


def new_key_file(path: Path) -> None:
    """Write a new key, 64 hexadecimal digits, that its owner alone can read.

    Raises:
        InputError: the name is taken: a key is never written over.
        StorageError: it cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(SealingKey.new().secret.hex().encode() + b"\n")
            file.flush()
            os.fsync(fd)
    except FileExistsError:
        raise InputError(
            "a key is never written over", got=path, next_step="choose another name"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} could not be written", got=error.strerror) from None


def read_key(source: str | Path) -> SealingKey:
    """The key in a file; ``-``: on standard input; ``fd``: on the descriptor whose number the
    environment has as ``HOTLOOP_KEY_FD``.

    Raises:
        InputError: missing, open to others, or no key. What was read is never shown.
    """
    text = str(source)
    try:
        if text == "-":
            data = sys.stdin.buffer.read(4096)
        elif text == "fd":
            data = _from_descriptor()
        else:
            data = _from_file(Path(text))
    except OSError as error:
        raise InputError(f"the key in {text} must be readable", got=error.strerror) from None
    if not _TEXT.fullmatch(data):
        raise InputError(
            "a key is 64 hexadecimal digits, as hotloop enclave key new writes",
            got=f"{len(data)} other bytes in {text}",
        )
    return SealingKey(bytes.fromhex(data.decode()))


def key_file_from_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--key-file`` to a command."""
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help=f"key of sealed files, mode 0600; -: standard input; fd: the descriptor {DESCRIPTOR}",
    )


def _from_file(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise InputError("a key file must be a plain file", got=path)
        if info.st_mode & 0o077:
            raise InputError(
                "a key file must be for its owner alone, mode 0600",
                got=f"mode {stat.S_IMODE(info.st_mode):04o} of {path}",
                next_step=f"make a new key; others may have read this one (chmod 600 {path})",
            )
        return file.read(4096)


def _from_descriptor() -> bytes:
    number = os.environ.get(DESCRIPTOR, "")
    if not number.isdecimal():
        raise InputError(f"{DESCRIPTOR} must be the number of a descriptor", got=repr(number))
    parts: list[bytes] = []
    with contextlib.closing(open(int(number), "rb", buffering=0)) as file:
        while len(b"".join(parts)) < 4096 and (data := file.read(4096)):
            parts.append(data)
    return b"".join(parts)
