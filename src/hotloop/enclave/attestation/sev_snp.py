"""Attestation reports of AMD SEV-SNP.

The format: AMD, "SEV Secure Nested Paging Firmware ABI Specification" (56860), ATTESTATION_REPORT;
its certificates: "Versioned Chip Endorsement Key (VCEK) Certificate and KDS Interface
Specification" (57230).

Evidence: the report of 1,184 bytes, then certificates in DER: the chip's (VCEK) or the
provider's (VLEK), AMD's intermediate (ASK or ASVK), and, if one likes, AMD's root (ARK).
"""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ...errors import AttestationError
from .certificates import load_certificate, split_der, verify_chain, verify_ecdsa
from .fields import Fields
from .policy import Claims, Policy, check_nonce

REPORT_BYTES = 1184
_SIGNED_BYTES = 0x2A0
_VERSIONS = (2, 3, 4, 5)
_ECDSA_P384 = 1
_DEBUG = 1 << 19  # Of the guest's policy.
_ALWAYS_ONE = 1 << 17
_VCEK, _VLEK = 0, 1
_TURIN = 0x1A  # Family; its versions have another order, and one more.
_TCB = ("bootloader", "tee", None, None, None, None, "snp", "microcode")
_TCB_TURIN = ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode")
_AMD = "1.3.6.1.4.1.3704.1."
_OIDS = {"bootloader": _AMD + "3.1", "tee": _AMD + "3.2", "snp": _AMD + "3.3",
         "microcode": _AMD + "3.8", "fmc": _AMD + "3.9"}  # fmt: skip
_HARDWARE_ID = _AMD + "4"


def verify(evidence: bytes, *, policy: Policy, nonce: bytes, now_s: float) -> Claims:
    """What the report says, if AMD's chip signed it and the policy allows it.

    Args:
        evidence: see the top of the file.
        policy: its ``roots`` are AMD's ARK certificates.
        nonce: that must be in ``REPORT_DATA``.
        now_s: seconds since 1970.

    Raises:
        AttestationError: it is not accepted.
    """
    report = evidence[:REPORT_BYTES]
    chain = [load_certificate(der, "a certificate of the chip")
             for der in split_der(evidence[REPORT_BYTES:], "the chip's chain")]  # fmt: skip
    fields = _Report(report)
    root = verify_chain(chain, policy.roots, now_s, policy.crls)
    leaf = chain[0]
    _verify_signature(report, leaf)
    _check_certificate(leaf, fields)
    check_nonce(fields.report_data, nonce)
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return policy.admit(
        Claims(
            kind="sev-snp",
            measurements=fields.measurements,
            debug=bool(fields.guest_policy & _DEBUG),
            tcb=fields.tcb,
            signer=hashlib.sha256(spki).hexdigest(),
            root_sha256=root.fingerprint(hashes.SHA256()).hex(),
        ),
        now_s,
    )


class _Report:
    """The fields of a report that are looked at; their names are AMD's."""

    def __init__(self, report: bytes) -> None:
        fields = Fields(report, "an SEV-SNP report", "little")
        version, svn = fields.number(4), fields.number(4)
        self.guest_policy = fields.number(8)
        family_id, image_id = fields.take(16), fields.take(16)
        vmpl, algorithm = fields.number(4), fields.number(4)
        fields.take(8 + 8)  # CURRENT_TCB, PLATFORM_INFO.
        flags = fields.number(4)
        fields.take(4)
        self.report_data = fields.take(64)
        measurement, host_data = fields.take(48), fields.take(32)
        id_key, author_key = fields.take(48), fields.take(48)
        fields.take(32 + 32)  # REPORT_ID, REPORT_ID_MA.
        reported_tcb = fields.take(8)
        family = fields.number(1)
        fields.take(23)
        self.chip_id = fields.take(64)
        fields.take(_SIGNED_BYTES - 0x1E0)
        self.signature = fields.take(512)
        fields.end()
        if version not in _VERSIONS or algorithm != _ECDSA_P384:
            raise AttestationError("an SEV-SNP report must be of version 2 to 5, by ECDSA P-384",
                                   got=f"version {version}, algorithm {algorithm}")  # fmt: skip
        if not self.guest_policy & _ALWAYS_ONE or vmpl > 3:
            raise AttestationError("an SEV-SNP report must be of a guest",
                                   got=f"policy {self.guest_policy:#x}, VMPL {vmpl}")  # fmt: skip
        self.signing_key = flags >> 2 & 7
        if self.signing_key not in (_VCEK, _VLEK) or flags & 2:
            raise AttestationError("an SEV-SNP report must be signed by the chip's or the "
                                   "provider's key", got=f"flags {flags:#x}")  # fmt: skip
        order = _TCB_TURIN if version >= 3 and family == _TURIN else _TCB
        self.tcb = {name: value for name, value in zip(order, reported_tcb, strict=True) if name}
        self.measurements = {
            "MEASUREMENT": measurement, "HOST_DATA": host_data, "ID_KEY_DIGEST": id_key,
            "AUTHOR_KEY_DIGEST": author_key, "FAMILY_ID": family_id, "IMAGE_ID": image_id,
            "GUEST_SVN": svn.to_bytes(4, "big"), "VMPL": bytes([vmpl]),
            "POLICY": self.guest_policy.to_bytes(8, "big"),
        }  # fmt: skip


def _verify_signature(report: bytes, leaf: x509.Certificate) -> None:
    """R and S, 72 bytes each, little-endian; zeros behind them."""
    signature = report[_SIGNED_BYTES:]
    if any(signature[144:]):
        raise AttestationError("the signature of an SEV-SNP report must end in zeros")
    r, s = int.from_bytes(signature[:72], "little"), int.from_bytes(signature[72:144], "little")
    verify_ecdsa(leaf.public_key(), r, s, report[:_SIGNED_BYTES], ec.SECP384R1,
                 "an SEV-SNP report")  # fmt: skip


def _check_certificate(leaf: x509.Certificate, fields: _Report) -> None:
    """The certificate is for this chip, and its key for the versions that the report names."""
    found = {
        extension.oid.dotted_string: extension.value.value
        for extension in leaf.extensions
        if isinstance(extension.value, x509.UnrecognizedExtension)
    }
    for name, version in fields.tcb.items():
        # A DER INTEGER of one byte, or of two where the first bit would be a sign.
        der = b"\x02\x01" + bytes([version]) if version < 128 else b"\x02\x02\0" + bytes([version])
        if found.get(_OIDS[name]) != der:
            raise AttestationError(f"the chip's certificate must be for the {name} of the report",
                                   got=version)  # fmt: skip
    chip = found.get(_HARDWARE_ID)
    if fields.signing_key == _VCEK:
        if chip is None or chip.ljust(64, b"\0") != fields.chip_id or len(chip) < 8:
            raise AttestationError("the chip's certificate must be for the chip of the report",
                                   got=fields.chip_id.hex())  # fmt: skip
    elif chip is not None:
        raise AttestationError("a provider's key must not have a chip's certificate")
