"""A counter in a TPM 2.0, by the commands of tpm2-tools.

An NV index of the type counter can only be incremented, and begins above every counter that this
TPM ever had: deleting and defining it again does not lower it (TPM 2.0 Library, part 1, "NV
Counters"). tpm2-tools take the TPM from ``TPM2TOOLS_TCTI``.
"""

from __future__ import annotations

import subprocess

from ..errors import InputError, RunError, StorageError

_TIMEOUT_S = 30.0


class TpmCounter:
    """See ``counter.Counter``.

    Args:
        index: handle of the NV index.
    """

    begins_at_zero = False

    def __init__(self, index: int) -> None:
        self.index = index

    def __str__(self) -> str:
        return f"tpm:{self.index:#x}"

    def create(self) -> None:
        """Define the index and make it readable.

        Raises:
            RunError: tpm2-tools are missing, or the TPM refuses.
        """
        attributes = "ownerread|ownerwrite|authread|authwrite|nt=counter"
        self._call("tpm2_nvdefine", f"{self.index:#x}", "-C", "o", "-s", "8", "-a", attributes)
        self._increment()

    def read(self) -> int:
        """See ``counter.Counter``."""
        try:
            data = self._call("tpm2_nvread", f"{self.index:#x}", "-C", "o", "-s", "8")
        except StorageError as error:
            raise InputError(
                f"the counter {self} must be readable",
                got=error.got,
                next_step=f"for a new run: hotloop enclave counter new {self}",
            ) from None
        return int.from_bytes(data, "big")

    def advance(self, number: int) -> None:
        """See ``counter.Counter``."""
        try:
            now = self.read()
            if number - now > 1000:
                raise StorageError(f"{self} must be at most 1000 below {number}", got=now)
            for _ in range(now, number):
                self._increment()
        except InputError as error:
            raise StorageError(f"{self} could not be advanced", got=error.got) from None

    def _increment(self) -> None:
        self._call("tpm2_nvincrement", f"{self.index:#x}", "-C", "o")

    def _call(self, *command: str) -> bytes:
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except FileNotFoundError:
            raise RunError(
                "a counter in a TPM needs tpm2-tools", got=f"no {command[0]}",
                next_step="apt-get install tpm2-tools",
            ) from None  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(f"{command[0]} must end", got=f"nothing in {_TIMEOUT_S:g} s") from None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise StorageError(f"{command[0]} must succeed", got=lines[0] if lines else "an error")
        return done.stdout
