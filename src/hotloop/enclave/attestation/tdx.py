"""Quotes of Intel TDX, versions 4 and 5.

The format: Intel, "TDX DCAP Quoting Library API", appendix A.3. The quote is signed by a key that
the quoting enclave made; the enclave's report, which holds that key's hash, is signed by the
platform's key (PCK), whose chain leads to Intel's root. The certificates are in the quote.

Which versions are enough: the policy's ``min_tcb``, and Intel's own judgement where the owner gives
it (``tcb_info``). Intel's identity of the quoting enclave is not asked; ``qe_svn`` can be.
"""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ...errors import AttestationError
from .certificates import load_pem_chain, verify_chain, verify_ecdsa
from .fields import Fields
from .pck import platform_versions
from .policy import Claims, Policy, check_nonce
from .tcb_info import Platform, check_status

_WHAT = "a TDX quote"
_HEADER_BYTES, _QE_REPORT_BYTES = 48, 384
_ECDSA_P256 = 2
_TDX = 0x81
_INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")  # QE_VENDOR_ID.
_BODIES = {2: 584, 3: 648}  # Of version 5: TD 1.0 and TD 1.5.
_QE_REPORT_DATA, _PCK_CHAIN = 6, 5
_DEBUG_BITS = 0xFF  # TUD of TDATTRIBUTES: bit 0 is DEBUG, the others must be 0 as well.
_SGX_DEBUG = 0x02  # Of the quoting enclave's ATTRIBUTES.
# Who signs Intel's TD quoting enclave, and its product number (Intel's QE identity).
_QE_SIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
_QE_PRODUCT = 2


def verify(evidence: bytes, *, policy: Policy, nonce: bytes, now_s: float) -> Claims:
    """What the quote says, if Intel's chain vouches for it and the policy allows it.

    Args:
        evidence: the quote, without the rest of the buffer it came in (``trim``).
        policy: its ``roots`` are Intel's SGX root certificate.
        nonce: that must be in ``REPORTDATA``.
        now_s: seconds since 1970.

    Raises:
        AttestationError: it is not accepted.
    """
    fields = Fields(evidence, _WHAT, "little")
    version = _check_header(fields.take(_HEADER_BYTES))
    size = _BODIES[2]
    if version == 5:
        kind, stated = fields.number(2), fields.number(4)
        size = _BODIES.get(kind, -1)
        if stated != size:
            raise AttestationError(f"{_WHAT} must be of a TD", got=f"{kind} of {stated} bytes")
    body = fields.take(size)
    signed = evidence[: len(evidence) - fields.left]
    tail = Fields(fields.take(fields.number(4)), f"the signature of {_WHAT}", "little")
    fields.end()
    signature, key = tail.take(64), tail.take(64)
    _verify_p256(_raw_key(key), signature, signed, _WHAT)
    leaf, root, qe_svn = _verify_quoting_enclave(tail, key, policy, now_s)
    measurements, attributes, module_svn = _read_body(body)
    check_nonce(measurements.pop("REPORTDATA"), nonce)
    versions, measurements["FMSPC"] = platform_versions(leaf)
    status = None
    if policy.tcb_info:
        platform = Platform(
            measurements["FMSPC"], [versions[f"cpu_svn_{i}"] for i in range(1, 17)],
            versions["pce_svn"], module_svn, measurements["MRSIGNERSEAM"],
        )  # fmt: skip
        status = check_status(policy.tcb_info, platform, policy.tcb_status, policy.roots,
                              policy.crls, now_s)  # fmt: skip
    # TEE_TCB_SVN: minor and major version of the module, then the loader of its patches.
    versions |= {"module_svn": module_svn[0], "module_major": module_svn[1],
                 "seam_svn": module_svn[2], "qe_svn": qe_svn}  # fmt: skip
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return policy.admit(
        Claims(
            kind="tdx",
            measurements=measurements,
            debug=bool(attributes & _DEBUG_BITS),
            tcb=versions,
            signer=hashlib.sha256(spki).hexdigest(),
            root_sha256=root.fingerprint(hashes.SHA256()).hex(),
            tcb_status=status,
        ),
        now_s,
    )


def trim(buffer: bytes) -> bytes:
    """The quote at the front of a buffer, by the lengths that it states; not verified.

    Raises:
        AttestationError: the buffer ends before the quote does.
    """
    fields = Fields(buffer, _WHAT, "little")
    version = fields.number(2)
    fields.take(_HEADER_BYTES - 2)
    if version == 5:
        fields.take(2)
        fields.take(fields.number(4))
    else:
        fields.take(_BODIES[2])
    fields.take(fields.number(4))
    return buffer[: len(buffer) - fields.left]


def _check_header(header: bytes) -> int:
    fields = Fields(header, _WHAT, "little")
    version, algorithm, kind = fields.number(2), fields.number(2), fields.number(4)
    fields.take(4)
    if version not in (4, 5) or algorithm != _ECDSA_P256 or kind != _TDX:
        raise AttestationError(f"{_WHAT} must be of version 4 or 5, by ECDSA P-256",
                               got=f"{version}, {algorithm}, {kind:#x}")  # fmt: skip
    if fields.take(16) != _INTEL:
        raise AttestationError(f"{_WHAT} must be by Intel's quoting enclave")
    return version


def _read_body(body: bytes) -> tuple[dict[str, bytes], int, bytes]:
    """Measurements, TDATTRIBUTES, and the module's versions when the TD started."""
    fields = Fields(body, _WHAT, "little")
    module_svn = fields.take(16)
    found = {"MRSEAM": fields.take(48), "MRSIGNERSEAM": fields.take(48)}
    seam_attributes, attributes = fields.number(8), fields.number(8)
    if seam_attributes:
        raise AttestationError(
            "the TDX module must have no attributes", got=f"{seam_attributes:#x}"
        )
    found["TDATTRIBUTES"] = attributes.to_bytes(8, "big")
    found["XFAM"] = fields.number(8).to_bytes(8, "big")
    for name in ("MRTD", "MRCONFIGID", "MROWNER", "MROWNERCONFIG",
                 "RTMR0", "RTMR1", "RTMR2", "RTMR3"):  # fmt: skip
        found[name] = fields.take(48)
    found["REPORTDATA"] = fields.take(64)
    if fields.left:
        found["TEE_TCB_SVN_2"] = fields.take(16)  # Of the module that runs now.
        found["MRSERVICETD"] = fields.take(48)
    fields.end()
    return found, attributes, module_svn


def _verify_quoting_enclave(
    tail: Fields, key: bytes, policy: Policy, now_s: float
) -> tuple[x509.Certificate, x509.Certificate, int]:
    """The platform's certificate, its root, and the version of the quoting enclave."""
    kind = tail.number(2)
    inner = Fields(tail.take(tail.number(4)), f"the signature of {_WHAT}", "little")
    tail.end()
    if kind != _QE_REPORT_DATA:
        raise AttestationError(f"{_WHAT} must hold its quoting enclave's report", got=kind)
    report, signature = inner.take(_QE_REPORT_BYTES), inner.take(64)
    authentication = inner.sized()
    kind = inner.number(2)
    pem = inner.take(inner.number(4))
    inner.end()
    if kind != _PCK_CHAIN:
        raise AttestationError(f"{_WHAT} must hold the platform's certificates", got=kind)
    chain = load_pem_chain(pem, "the platform's chain")
    root = verify_chain(chain, policy.roots, now_s, policy.crls)
    _verify_p256(chain[0].public_key(), signature, report, "the quoting enclave's report")
    fields = Fields(report, "the quoting enclave's report", "little")
    fields.take(16 + 4 + 28)
    attributes = fields.take(16)
    fields.take(32 + 32)
    signer = fields.take(32)
    fields.take(96)
    product, svn = fields.number(2), fields.number(2)
    fields.take(60)
    bound = fields.take(64)
    if attributes[0] & _SGX_DEBUG or signer != _QE_SIGNER or product != _QE_PRODUCT:
        raise AttestationError("the quoting enclave must be Intel's, not in debug mode",
                               got=f"{signer.hex()}, product {product}")  # fmt: skip
    if bound != hashlib.sha256(key + authentication).digest().ljust(64, b"\0"):
        raise AttestationError("the quoting enclave's report must be for the key of the quote")
    return chain[0], root, svn


def _raw_key(key: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + key)
    except ValueError:
        raise AttestationError(f"the key of {_WHAT} must be a point of P-256") from None


def _verify_p256(key: object, signature: bytes, data: bytes, what: str) -> None:
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    verify_ecdsa(key, r, s, data, ec.SECP256R1, what)
