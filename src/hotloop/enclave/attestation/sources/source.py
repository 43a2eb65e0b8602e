"""What every source of evidence has, and which one belongs to a kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ....errors import InputError
from ..policy import KINDS
from .nsm import NitroModule
from .tpm_tools import DEFAULT_KEY, DEFAULT_PCRS, TpmTools
from .tsm import TsmReport


class EvidenceSource(Protocol):
    """Makes evidence of what runs here."""

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        ...

    def make(self, nonce: bytes, public_key: bytes) -> bytes:
        """Evidence that holds the nonce, and the key where the kind has a field for it.

        Raises:
            RunError: the device failed.
            InputError: there is no such device here.
        """
        ...


def open_source(
    kind: str,
    *,
    tpm_key: str = DEFAULT_KEY,
    pcrs: Sequence[int] = DEFAULT_PCRS,
    certificates: Sequence[Path] = (),
) -> EvidenceSource:
    """The source of one kind.

    Args:
        kind: one of ``KINDS``.
        tpm_key: handle or context file of the TPM's attestation key.
        pcrs: registers that the TPM quotes.
        certificates: files for the chain that the device does not give: a TPM's attestation key,
            SEV-SNP's chip and AMD's intermediate.

    Raises:
        InputError: the kind is unknown.
    """
    if kind == "tpm":
        return TpmTools(tpm_key, pcrs, certificates)
    if kind == "nitro":
        return NitroModule()
    if kind in ("sev-snp", "tdx"):
        return TsmReport(kind, certificates)
    raise InputError(f"evidence must be one of {', '.join(KINDS)}", got=kind)
