"""Attestation documents of AWS Nitro Enclaves.

The format: AWS, "Nitro Enclaves Attestation Process" (aws-nitro-enclaves-nsm-api): a COSE_Sign1
(RFC 9052) by ES384, whose payload holds measurements, the chain of certificates to AWS's root, and
three fields that the enclave fills: ``nonce``, ``public_key``, ``user_data``.
"""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ...errors import AttestationError
from . import cbor
from .certificates import load_certificate, verify_chain, verify_ecdsa
from .policy import Claims, Policy, check_nonce

_MAX_BYTES = 64 * 1024
_COSE_SIGN1 = 18
_PROTECTED = cbor.encode({1: -35})  # alg: ES384.
_SIGNATURE_BYTES = 96
_WHAT = "a Nitro document"
# AWS's limits of the fields that the enclave fills.
_MAX_FIELD = {"public_key": 1024, "user_data": 1024, "nonce": 1024}


def verify(evidence: bytes, *, policy: Policy, nonce: bytes, now_s: float) -> Claims:
    """What the document says, if AWS signed it and the policy allows it.

    Args:
        evidence: the document as the Nitro Security Module gives it.
        policy: its ``roots`` are AWS's root certificate.
        nonce: that must be in it.
        now_s: seconds since 1970. The certificates live for hours only.

    Raises:
        AttestationError: it is not accepted.
    """
    if len(evidence) > _MAX_BYTES:
        raise AttestationError(f"{_WHAT} must have at most {_MAX_BYTES} bytes", got=len(evidence))
    outer = cbor.decode(evidence, _WHAT, tag=_COSE_SIGN1)
    if not isinstance(outer, list) or len(outer) != 4:
        raise AttestationError(f"{_WHAT} must be a COSE_Sign1")
    protected, unprotected, payload, signature = outer
    if protected != _PROTECTED or unprotected != {} or not isinstance(payload, bytes):
        raise AttestationError(f"{_WHAT} must be signed by ES384, without unprotected headers")
    if not isinstance(signature, bytes) or len(signature) != _SIGNATURE_BYTES:
        raise AttestationError(f"the signature of {_WHAT} must have {_SIGNATURE_BYTES} bytes")
    fields = _fields(cbor.decode(payload, _WHAT))
    leaf = load_certificate(fields["certificate"], "the certificate of a Nitro document")
    # The bundle begins with the root; a chain here begins with the key that signed.
    above = [load_certificate(one, "a certificate of the bundle") for one in fields["cabundle"]]
    root = verify_chain([leaf, *reversed(above)], policy.roots, now_s, policy.crls)
    half = _SIGNATURE_BYTES // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    signed = cbor.encode(["Signature1", protected, b"", payload])
    verify_ecdsa(leaf.public_key(), r, s, signed, ec.SECP384R1, _WHAT)
    check_nonce(fields.get("nonce") or b"", nonce)
    pcrs = fields["pcrs"]
    spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    return policy.admit(
        Claims(
            kind="nitro",
            measurements={f"PCR{number}": value for number, value in sorted(pcrs.items())},
            # Run with --debug-mode, an enclave's measurements are zeros.
            debug=not any(pcrs.get(0, b"")),
            tcb={},
            signer=digest.finalize().hex(),
            root_sha256=root.fingerprint(hashes.SHA256()).hex(),
            made_at_s=fields["timestamp"] / 1000,
            public_key=fields.get("public_key"),
            user_data=fields.get("user_data"),
        ),
        now_s,
    )


def _fields(document: Any) -> dict[str, Any]:
    """The payload, with each field of its type and size.

    Raises:
        AttestationError: one is not.
    """

    def wrong(name: str) -> AttestationError:
        return AttestationError(f"the field {name} of {_WHAT} must be there, of its type and size")

    if not isinstance(document, dict):
        raise wrong("payload")
    for name, kind in (("module_id", str), ("digest", str), ("timestamp", int), ("pcrs", dict),
                       ("certificate", bytes), ("cabundle", list)):  # fmt: skip
        if not isinstance(document.get(name), kind):
            raise wrong(name)
    if not document["module_id"] or document["digest"] != "SHA384":
        raise wrong("digest")
    if not 0 < document["timestamp"] < 1 << 53:
        raise wrong("timestamp")
    pcrs = document["pcrs"]
    if not 1 <= len(pcrs) <= 32 or not all(
        isinstance(number, int) and 0 <= number < 32 and isinstance(value, bytes)
        and len(value) in (32, 48, 64) for number, value in pcrs.items()
    ):  # fmt: skip
        raise wrong("pcrs")
    bundle = document["cabundle"]
    if not 1 <= len(bundle) <= 7 or not all(
        isinstance(one, bytes) and 1 <= len(one) <= 1024 for one in bundle
    ):
        raise wrong("cabundle")
    for name, most in _MAX_FIELD.items():
        value = document.get(name)
        if value is not None and not (isinstance(value, bytes) and len(value) <= most):
            raise wrong(name)
    return document
