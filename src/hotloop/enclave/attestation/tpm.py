"""Quotes of a TPM 2.0 (TCG, Trusted Platform Module Library, Part 2: Structures).

A TPM signs hashes of what was booted (PCRs) and the nonce with an attestation key that never
leaves it. That is what a machine booted, not an enclave: who has the machine has its memory.

Evidence, numbers big-endian as the TPM's own:

    "TPM1"
    u16 size, TPMS_ATTEST
    u16 size, TPMT_SIGNATURE
    u16 size, TPMT_PUBLIC of the attestation key
    u16 size, values of the quoted PCRs, in rising order
    certificates in DER, the attestation key's first; none where the policy lists the key
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from ...errors import AttestationError
from .certificates import load_certificate, split_der, verify_chain
from .fields import Fields
from .policy import Claims, Policy, check_nonce

MAGIC = b"TPM1"
_GENERATED = 0xFF544347  # TPM_GENERATED_VALUE
_QUOTE = 0x8018  # TPM_ST_ATTEST_QUOTE
_RSA, _ECC, _NULL = 0x0001, 0x0023, 0x0010
_RSASSA, _RSAPSS, _ECDSA = 0x0014, 0x0016, 0x0018
_HASHES = {0x000B: ("sha256", hashes.SHA256), 0x000C: ("sha384", hashes.SHA384),
           0x000D: ("sha512", hashes.SHA512)}  # fmt: skip
_CURVES: dict[int, type[ec.EllipticCurve]] = {0x0003: ec.SECP256R1, 0x0004: ec.SECP384R1}
# fixedTPM, fixedParent, sensitiveDataOrigin, restricted, sign: the TPM made the key, keeps it, and
# signs with it only what the TPM made itself. decrypt must not be there.
_MUST = 0x0002 | 0x0010 | 0x0020 | 0x10000 | 0x40000
_MUST_NOT = 0x20000
_CERTIFIED = _MUST | 0x0040  # And userWithAuth: what tpm2_createak makes.


@dataclass(frozen=True)
class AttestationKey:
    """The public part of an attestation key.

    Attributes:
        name: hash of all of it, as the TPM names it: two bytes of algorithm, then the digest.
        key: for verifying.
        scheme, hash_id: the only ones that it signs with.
        attributes: of the TPM's object.
        has_policy: it needs more than a password.
    """

    name: bytes
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    scheme: int
    hash_id: int
    attributes: int
    has_policy: bool


def read_public(area: bytes) -> AttestationKey:
    """A ``TPMT_PUBLIC``.

    Raises:
        AttestationError: it is not the public part of a key that attests.
    """
    fields = Fields(area, "the TPM's key", "big")
    kind, name_id, attributes = fields.number(2), fields.number(2), fields.number(4)
    has_policy = bool(fields.sized())
    symmetric, scheme = fields.number(2), fields.number(2)
    if symmetric != _NULL or scheme not in (_RSASSA, _RSAPSS, _ECDSA) or name_id not in _HASHES:
        raise AttestationError("a TPM's attestation key must only sign, with SHA-2",
                               got=f"symmetric {symmetric:#06x}, scheme {scheme:#06x}")  # fmt: skip
    hash_id = fields.number(2)
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey
    try:
        if kind == _ECC and scheme == _ECDSA:
            curve, kdf = fields.number(2), fields.number(2)
            x, y = fields.sized(), fields.sized()
            if curve not in _CURVES or kdf != _NULL:
                raise ValueError("curve")
            key = ec.EllipticCurvePublicNumbers(
                int.from_bytes(x, "big"), int.from_bytes(y, "big"), _CURVES[curve]()
            ).public_key()
        elif kind == _RSA and scheme != _ECDSA:
            bits, exponent = fields.number(2), fields.number(4)
            modulus = int.from_bytes(fields.sized(), "big")
            if modulus.bit_length() != bits or bits < 2048:
                raise ValueError("bits")
            key = rsa.RSAPublicNumbers(exponent or 65537, modulus).public_key()
        else:
            raise ValueError("kind")
    except ValueError:
        raise AttestationError("a TPM's attestation key must be RSA of 2048 bits or more, or "
                               "on P-256 or P-384") from None  # fmt: skip
    fields.end()
    if attributes & _MUST != _MUST or attributes & _MUST_NOT or hash_id not in _HASHES:
        raise AttestationError("a TPM's attestation key must be restricted to signing, and made "
                               "and kept by the TPM", got=f"{attributes:#x}")  # fmt: skip
    name = name_id.to_bytes(2, "big") + hashlib.new(_HASHES[name_id][0], area).digest()
    return AttestationKey(name, key, scheme, hash_id, attributes, has_policy)


def pack(
    attest: bytes, signature: bytes, public: bytes, values: bytes, chain: Sequence[bytes] = ()
) -> bytes:
    """Evidence from its parts; see the top of the file.

    Args:
        attest: ``TPMS_ATTEST``.
        signature: ``TPMT_SIGNATURE``.
        public: ``TPMT_PUBLIC``.
        values: of the quoted PCRs.
        chain: certificates in DER.
    """
    parts = (attest, signature, public, values)
    return MAGIC + b"".join(len(p).to_bytes(2, "big") + p for p in parts) + b"".join(chain)


def key_name(evidence: bytes) -> bytes:
    """The name of the attestation key in evidence that is not verified.

    Raises:
        AttestationError: there is none.
    """
    fields = Fields(evidence, "a TPM's evidence", "big")
    fields.take(len(MAGIC))
    _, _, public = fields.sized(), fields.sized(), fields.sized()
    return read_public(public).name


def verify(evidence: bytes, *, policy: Policy, nonce: bytes, now_s: float) -> Claims:
    """What the quote says, if it is a TPM's and the policy allows it.

    Args:
        evidence: see the top of the file.
        policy: its ``keys`` are names of attestation keys, its ``roots`` of their certificates.
        nonce: that must be in it.
        now_s: seconds since 1970.

    Raises:
        AttestationError: it is not accepted.
    """
    fields = Fields(evidence, "a TPM's evidence", "big")
    if fields.take(4) != MAGIC:
        raise AttestationError("a TPM's evidence must begin with TPM1", got=evidence[:4].hex())
    attest, signature, public, values = (fields.sized() for _ in range(4))
    chain = [load_certificate(der, "a certificate of the TPM's key")
             for der in split_der(fields.rest(), "the chain of the TPM's key")]  # fmt: skip
    key = read_public(public)
    root = _trust(key, chain, policy, now_s)
    _verify_signature(key, signature, attest)
    quoted, firmware = _read_attest(attest, nonce, key)
    measurements = _measurements(quoted, values, key.hash_id)
    return policy.admit(
        Claims(
            kind="tpm",
            measurements=measurements,
            debug=None,
            tcb={"firmware": firmware},
            signer=key.name.hex(),
            root_sha256=None if root is None else root.fingerprint(hashes.SHA256()).hex(),
        ),
        now_s,
    )


def _trust(
    key: AttestationKey, chain: list[x509.Certificate], policy: Policy, now_s: float
) -> x509.Certificate | None:
    """The root that vouches for the key; ``None``: the policy lists the key itself."""
    if not chain:
        if key.name not in policy.keys:
            raise AttestationError("a TPM's attestation key must be one of the policy",
                                   got=key.name.hex())  # fmt: skip
        return None
    root = verify_chain(chain, policy.roots, now_s, policy.crls)
    if chain[0].public_key() != key.key:
        raise AttestationError("the certificate must be of the TPM's attestation key")
    if key.attributes != _CERTIFIED or key.has_policy:
        # The certificate vouches for the key alone: what else its public part says is unsigned.
        raise AttestationError(f"a certified attestation key must have the attributes "
                               f"{_CERTIFIED:#x} and no policy",
                               got=f"{key.attributes:#x}",
                               next_step="list its name in the policy's keys")  # fmt: skip
    return root


def _verify_signature(key: AttestationKey, signature: bytes, attest: bytes) -> None:
    fields = Fields(signature, "the TPM's signature", "big")
    scheme, hash_id = fields.number(2), fields.number(2)
    if (scheme, hash_id) != (key.scheme, key.hash_id):
        raise AttestationError("a TPM's signature must be by the scheme of its key",
                               got=f"{scheme:#06x}")  # fmt: skip
    first = fields.sized()
    second = fields.sized() if scheme == _ECDSA else b""
    fields.end()
    algorithm = _HASHES[hash_id][1]()
    try:
        if isinstance(key.key, ec.EllipticCurvePublicKey):
            size = (key.key.key_size + 7) // 8
            if len(first) > size or len(second) > size:
                raise InvalidSignature
            der = encode_dss_signature(int.from_bytes(first, "big"), int.from_bytes(second, "big"))
            key.key.verify(der, attest, ec.ECDSA(algorithm))
        elif scheme == _RSASSA:
            key.key.verify(first, attest, padding.PKCS1v15(), algorithm)
        else:
            pss = padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
            key.key.verify(first, attest, pss, algorithm)
    except (InvalidSignature, ValueError):
        raise AttestationError("the signature of a TPM's quote must hold") from None


def _read_attest(attest: bytes, nonce: bytes, key: AttestationKey) -> tuple[Fields, int]:
    """What is behind the head of a quote, and the TPM's firmware version."""
    fields = Fields(attest, "a TPM's quote", "big")
    magic, kind = fields.number(4), fields.number(2)
    if magic != _GENERATED or kind != _QUOTE:
        raise AttestationError("a TPM's evidence must be a quote that the TPM made",
                               got=f"{magic:#x}, {kind:#x}")  # fmt: skip
    fields.sized()  # qualifiedSigner: the key, whose signature holds, under its parents.
    check_nonce(fields.sized(), nonce)
    fields.take(8 + 4 + 4 + 1)  # Clock, resets, restarts, safe.
    return fields, fields.number(8)


def _measurements(fields: Fields, values: bytes, hash_id: int) -> dict[str, bytes]:
    """PCRs by name, from the selection and digest that are signed and the values that are not."""
    if fields.number(4) != 1:
        raise AttestationError("a TPM's quote must be of PCRs of one bank")
    bank = fields.number(2)
    bits = int.from_bytes(fields.take(fields.number(1)), "little")
    digest = fields.sized()
    fields.end()
    if bank not in _HASHES:
        raise AttestationError("a TPM's quote must be of a bank of SHA-2", got=f"{bank:#06x}")
    size = hashlib.new(_HASHES[bank][0]).digest_size
    chosen = [place for place in range(bits.bit_length()) if bits >> place & 1]
    if not chosen or len(values) != size * len(chosen):
        raise AttestationError(f"a TPM's evidence must have a value for each of {len(chosen)} PCRs",
                               got=f"{len(values)} bytes")  # fmt: skip
    if hashlib.new(_HASHES[hash_id][0], values).digest() != digest:
        raise AttestationError("the values of the PCRs must be those that the TPM signed")
    return {f"PCR{p}": values[i * size : (i + 1) * size] for i, p in enumerate(chosen)}
