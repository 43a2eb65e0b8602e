"""Quotes of the TPM here, made by tpm2-tools (``TPM2TOOLS_TCTI`` says which TPM)."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from ....errors import InputError, RunError
from ..certificates import load_certificates
from ..tpm import pack

DEFAULT_KEY = "0x81010002"
# Firmware, its configuration, boot loader, and what the loader and the kernel's image measured.
DEFAULT_PCRS = (0, 1, 2, 3, 4, 5, 7, 8, 9)
_TIMEOUT_S = 60.0


class TpmTools:
    """A TPM's attestation key.

    Args:
        key: persistent handle (``0x81010002``) or context file.
        pcrs: registers of the bank of SHA-256 to quote.
        certificates: files with the key's certificate and those above it.
    """

    kind = "tpm"

    def __init__(
        self,
        key: str = DEFAULT_KEY,
        pcrs: Sequence[int] = DEFAULT_PCRS,
        certificates: Sequence[Path] = (),
    ) -> None:
        if not pcrs or not all(0 <= one < 24 for one in pcrs):
            raise InputError("PCRs must be numbers from 0 to 23", got=list(pcrs))
        self.key = key
        self.pcrs = sorted(set(pcrs))
        self._chain = read_chain(certificates)

    def make(self, nonce: bytes, public_key: bytes) -> bytes:
        """A quote over the nonce; a TPM has no field for the key, which the nonce binds.

        Raises:
            RunError: the TPM or its tools failed.
            InputError: the tools are not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder)
            _call("tpm2_readpublic", "-c", self.key, "-f", "tss", "-o", at / "public")
            _call("tpm2_quote", "-c", self.key, "-l",
                  "sha256:" + ",".join(map(str, self.pcrs)), "-q", nonce.hex(), "-g", "sha256",
                  "-m", at / "attest", "-s", at / "signature", "-o", at / "values",
                  "-F", "values")  # fmt: skip
            public = (at / "public").read_bytes()[2:]  # TPM2B_PUBLIC, without its size.
            return pack((at / "attest").read_bytes(), (at / "signature").read_bytes(), public,
                        (at / "values").read_bytes(), self._chain)  # fmt: skip


def make_attestation_key(handle: str = DEFAULT_KEY) -> bytes:
    """Make an attestation key on P-256 below the TPM's endorsement key, and keep it at ``handle``.

    Returns:
        its name, for the ``keys`` of a policy.

    Raises:
        RunError: the TPM failed, or something is at that handle already.
        InputError: the tools are not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        _call("tpm2_createek", "-c", at / "ek", "-G", "ecc", "-u", at / "ek.pub")
        _call("tpm2_createak", "-C", at / "ek", "-c", at / "ak", "-G", "ecc", "-g", "sha256",
              "-s", "ecdsa", "-n", at / "name")  # fmt: skip
        # A TPM without a resource manager has room for three objects.
        _call("tpm2_flushcontext", "-t")
        _call("tpm2_evictcontrol", "-C", "o", "-c", at / "ak", handle)
        _call("tpm2_flushcontext", "-t")
        return (at / "name").read_bytes()


def read_chain(files: Sequence[Path]) -> list[bytes]:
    """Certificates of files, in their order, in DER.

    Raises:
        InputError: a file cannot be read or is none.
    """
    chain = []
    for path in files:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} must be readable", got=error.strerror) from None
        found = load_certificates(data, str(path))
        chain += [one.public_bytes(Encoding.DER) for one in found]
    return chain


def _call(tool: str, *arguments: str | Path) -> None:
    if shutil.which(tool) is None:
        raise InputError(f"quotes of a TPM need {tool}", next_step="apt-get install tpm2-tools")
    try:
        done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True,
                              timeout=_TIMEOUT_S, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError(f"{tool} must answer", got=error) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RunError(
            f"{tool} failed",
            got=(lines or done.stderr.splitlines() or [""])[0],
            next_step="see that TPM2TOOLS_TCTI names the TPM, and the key's handle",
        )
