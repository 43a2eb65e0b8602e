"""A number kept where whoever can replace checkpoints cannot lower it.

A checkpoint gets the counter's number and one more; when it is on the disk, the counter follows.
So the newest checkpoint is never below the counter, and one that is was put back.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Protocol

from ..errors import InputError, StorageError
from .tpm import TpmCounter


class Counter(Protocol):
    """A number that only grows. One run has one.

    Attributes:
        begins_at_zero: so that a run without checkpoints has a counter at 0.
    """

    begins_at_zero: bool

    def read(self) -> int:
        """The number now.

        Raises:
            InputError: it is missing or damaged.
        """

    def advance(self, number: int) -> None:
        """Make it at least ``number``; returns when it is durable.

        Raises:
            StorageError: it cannot be.
        """


class FileCounter:
    """The number as text in a file, for a place that the checkpoints' host cannot write to.

    Args:
        path: the file; ``create`` makes it.
    """

    begins_at_zero = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """A new counter at 0.

        Raises:
            InputError: it is there. StorageError: it cannot be written.
        """
        if os.path.lexists(self.path):
            raise InputError("a counter is never written over", got=self.path)
        self._write(0)

    def read(self) -> int:
        """See ``Counter``."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(
                f"the counter {self.path} must be readable",
                got=error.strerror,
                next_step=f"for a new run: hotloop enclave counter new {self.path}",
            ) from None
        if not re.fullmatch(rb"(0|[1-9][0-9]{0,17})\n", data):
            raise InputError(f"the counter {self.path} must hold a number", got=repr(data[:40]))
        return int(data)

    def advance(self, number: int) -> None:
        """See ``Counter``."""
        if number > self.read():
            self._write(number)

    def _write(self, number: int) -> None:
        aside = self.path.with_name(f".{self.path.name}-{secrets.token_hex(6)}")
        try:
            with aside.open("xb") as file:
                file.write(f"{number}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise StorageError(
                f"the counter {self.path} could not be written", got=error.strerror
            ) from None


def parse_counter(text: str) -> FileCounter | TpmCounter:
    """``tpm:0x1500016``: an NV index of a TPM 2.0; anything else: a file.

    Raises:
        InputError: no such index.
    """
    if not text.startswith("tpm:"):
        return FileCounter(Path(text))
    try:
        index = int(text.removeprefix("tpm:"), 16)
    except ValueError:
        index = -1
    if not 0x01000000 <= index <= 0x01FFFFFF:
        raise InputError("a counter of a TPM is named tpm:0x01000000 to tpm:0x01ffffff", got=text)
    return TpmCounter(index)
