"""Reports of SEV-SNP and TDX by the kernel's common interface, configfs-tsm (Linux 6.7).

The interface: Linux, ``Documentation/ABI/testing/configfs-tsm-report``: a folder is made, the nonce
written to ``inblob``, the report read from ``outblob``; ``generation`` tells whether somebody else
wrote in between. AMD's certificates are in ``auxblob``, if the host gives them, in the table of
AMD's "SEV-ES Guest-Hypervisor Communication Block" (56421). Not run on such hardware.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from ....errors import AttestationError, InputError, RunError
from .. import sev_snp, tdx
from ..fields import Fields
from .tpm_tools import read_chain

_ROOT = Path("/sys/kernel/config/tsm/report")
_PROVIDERS = {"sev_guest": "sev-snp", "tdx_guest": "tdx"}
_NONCE_BYTES = 64
_VCEK, _VLEK, _ASK = (uuid.UUID(text).bytes for text in (
    "63da758d-e664-4564-adc5-f4b93be8accd", "a8074bc2-a25a-483e-aae6-39c045a0b8a1",
    "4ab7b379-bbac-4fe4-a02f-05aef327c782"))  # fmt: skip


class TsmReport:
    """The trusted security module of this virtual machine.

    Args:
        kind: ``sev-snp`` or ``tdx``: what the kernel must have.
        certificates: files with the chip's certificate and AMD's intermediate, where the host
            does not give them.
        root: folder of the interface.
    """

    def __init__(self, kind: str, certificates: Sequence[Path] = (), root: Path = _ROOT) -> None:
        self.kind = kind
        self._root = root
        self._chain = read_chain(certificates)

    def make(self, nonce: bytes, public_key: bytes) -> bytes:
        """A report or quote over the nonce; the key is bound by the nonce.

        Raises:
            InputError: the kernel has no such module, or no certificates are at hand.
            RunError: it failed, or another process used the same folder.
        """
        if not self._root.is_dir():
            raise InputError(
                f"{self._root} must be there: a guest of {self.kind} with Linux 6.7 or newer",
                next_step="mount -t configfs none /sys/kernel/config",
            )
        folder = self._root / f"hotloop-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            folder.mkdir()
            try:
                report, certificates = self._read(folder, nonce)
            finally:
                folder.rmdir()
        except OSError as error:
            raise RunError("the kernel's report must be readable", got=error.strerror) from None
        if self.kind == "tdx":
            return tdx.trim(report)
        chain = self._chain or certificates_of(certificates)
        if not chain:
            raise InputError("the host gives no certificates of its chip",
                             next_step="pass the chip's and AMD's with --certificates")  # fmt: skip
        return report[: sev_snp.REPORT_BYTES] + b"".join(chain)

    def _read(self, folder: Path, nonce: bytes) -> tuple[bytes, bytes]:
        provider = (folder / "provider").read_text().strip()
        if _PROVIDERS.get(provider) != self.kind:
            raise InputError(f"the kernel must be a guest of {self.kind}", got=provider)
        before = int((folder / "generation").read_text())
        (folder / "inblob").write_bytes(nonce.ljust(_NONCE_BYTES, b"\0"))
        report = (folder / "outblob").read_bytes()
        extra = folder / "auxblob"
        certificates = extra.read_bytes() if self.kind == "sev-snp" and extra.exists() else b""
        if int((folder / "generation").read_text()) != before + 1:
            raise RunError("a report must not be made by two at once", next_step="try again")
        return report, certificates


def certificates_of(table: bytes) -> list[bytes]:
    """The chip's (or provider's) certificate and AMD's intermediate of a host's table.

    Raises:
        RunError: the table is damaged.
    """
    found: dict[bytes, bytes] = {}
    fields = Fields(table, "the host's certificates", "little")
    try:
        while fields.left:
            name, offset, length = fields.take(16), fields.number(4), fields.number(4)
            if not any(name):
                break
            if offset + length > len(table):
                raise RunError("the host's certificates must be whole")
            found[name] = table[offset : offset + length]
    except AttestationError as error:
        raise RunError("the host's certificates must be a table", got=error) from None
    leaf = found.get(_VCEK) or found.get(_VLEK)
    return [leaf, found[_ASK]] if leaf and _ASK in found else []
