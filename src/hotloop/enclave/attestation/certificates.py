"""Chains of X.509 certificates, from the key that signed to a root that the owner chose.

A chain of evidence is given, not sought: it has one order and one way up. So this is the part of
RFC 5280 that such a chain needs, and refuses what it does not know.
"""

from __future__ import annotations

import datetime
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning

from ...errors import AttestationError, InputError

_MAX_CHAIN = 8
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_PEM_BEGIN = b"-----BEGIN CERTIFICATE-----"


def load_certificate(der: bytes, what: str) -> x509.Certificate:
    """One certificate in DER.

    Raises:
        AttestationError: it is none.
    """
    return _load(lambda: [x509.load_der_x509_certificate(der)], what)[0]


def load_pem_chain(pem: bytes, what: str) -> list[x509.Certificate]:
    """Certificates in PEM, exactly as they are written again; a zero may end them.

    Raises:
        AttestationError: it is anything else.
    """
    found = _load(lambda: x509.load_pem_x509_certificates(pem), what)
    again = b"".join(one.public_bytes(Encoding.PEM) for one in found)
    if pem not in (again, again + b"\0"):
        raise AttestationError(f"{what} must be certificates in PEM and nothing else")
    return found


def _load(load: Callable[[], list[x509.Certificate]], what: str) -> list[x509.Certificate]:
    """Read all that is read later: the library reads a part when it is asked for, and each part
    of a damaged certificate has an exception of its own."""
    found: list[x509.Certificate] = []
    try:
        with warnings.catch_warnings():
            # Certificates of AMD's chips have the serial number 0, which the library warns of.
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            found.extend(load())
            for one in found:
                one.public_key()
                for name in (one.subject, one.issuer):
                    name.rfc4514_string()
                _ = (list(one.extensions), one.signature_hash_algorithm, one.serial_number,
                     one.not_valid_before_utc, one.not_valid_after_utc, one.version)  # fmt: skip
                if not one.public_bytes(Encoding.DER).endswith(b"\0" + one.signature):
                    # The library passes over how many bits at the signature's end are unused.
                    raise ValueError("signature")
    except Exception as error:
        raise AttestationError(f"{what} must be a certificate", got=error) from None
    return found


def load_certificates(data: bytes, what: str) -> list[x509.Certificate]:
    """The certificates of an owner's file, PEM or DER.

    Raises:
        InputError: there are none.
    """
    try:
        found = [] if _PEM_BEGIN in data else [x509.load_der_x509_certificate(data)]
        return found or list(x509.load_pem_x509_certificates(data))
    except Exception as error:
        raise InputError(f"{what} must be certificates in PEM or DER", got=error) from None


def load_crl(data: bytes, what: str) -> x509.CertificateRevocationList:
    """A revocation list of an owner's file, PEM or DER.

    Raises:
        InputError: it is none.
    """
    try:
        if b"-----BEGIN" in data:
            return x509.load_pem_x509_crl(data)
        return x509.load_der_x509_crl(data)
    except Exception as error:
        raise InputError(f"{what} must be a revocation list", got=error) from None


def split_der(data: bytes, what: str) -> list[bytes]:
    """DER values that lie one behind the other.

    Raises:
        AttestationError: the last one is not whole, or there are more than a chain has.
    """
    parts: list[bytes] = []
    while data:
        if len(parts) == _MAX_CHAIN:
            raise AttestationError(f"{what} must be at most {_MAX_CHAIN} certificates")
        if len(data) < 4 or data[:2] != b"\x30\x82":
            raise AttestationError(f"{what} must be certificates in DER", got=data[:4].hex())
        size = 4 + int.from_bytes(data[2:4], "big")
        if size > len(data):
            raise AttestationError(f"{what} must be whole", got=f"{len(data)} bytes of {size}")
        parts.append(data[:size])
        data = data[size:]
    return parts


def verify_chain(
    chain: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now_s: float,
    crls: Sequence[x509.CertificateRevocationList] = (),
) -> x509.Certificate:
    """The root that vouches for the first certificate of ``chain``.

    Args:
        chain: from the key that signed upwards; the root itself may be its last one.
        roots: that are trusted.
        now_s: seconds since 1970, at which all of them must be valid.
        crls: revocation lists; those of other issuers are passed over.

    Raises:
        AttestationError: the chain does not lead to a root, or a certificate in it must not be
            used: expired, revoked, not for signing certificates, signed by another.
    """
    if not 1 <= len(chain) <= _MAX_CHAIN:
        raise AttestationError(f"a chain must have 1 to {_MAX_CHAIN} certificates", got=len(chain))
    path = list(chain)
    if path[-1] not in roots:
        above = [root for root in roots if _issued(path[-1], root)]
        if not above:
            raise AttestationError("a certificate must lead to a root of the policy",
                                   got=path[-1].issuer.rfc4514_string())  # fmt: skip
        path.append(above[0])
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    for place, one in enumerate(path):
        _check_use(one, place, now)
    for one, issuer in itertools.pairwise(path):
        if not _issued(one, issuer):
            raise AttestationError("each certificate must be signed by the next one of its chain",
                                   got=one.subject.rfc4514_string())  # fmt: skip
        _check_revoked(one, issuer, crls, now)
    return path[-1]


def _issued(one: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        if not isinstance(one.signature_hash_algorithm, _HASHES):
            return False
        one.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def _check_use(one: x509.Certificate, place: int, now: datetime.datetime) -> None:
    """One certificate alone; ``place`` 0 is the key that signed, those above sign certificates."""
    who = one.subject.rfc4514_string()
    if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
        raise AttestationError(
            f"the certificate of {who} must be valid now",
            got=f"valid from {one.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{one.not_valid_after_utc:%Y-%m-%d %H:%M}",
        )
    extensions = {extension.oid: extension for extension in one.extensions}
    constraints = extensions.pop(x509.OID_BASIC_CONSTRAINTS, None)
    usage = extensions.pop(x509.OID_KEY_USAGE, None)
    is_ca = constraints is not None and constraints.value.ca
    if is_ca != (place > 0):
        raise AttestationError(
            f"the certificate of {who} must {'' if place else 'not '}be one that signs others"
        )
    if place and constraints is not None:
        longest = constraints.value.path_length
        if longest is not None and place - 1 > longest:
            raise AttestationError(f"the chain below {who} must be shorter", got=place - 1)
    if usage is not None:
        allowed = usage.value.key_cert_sign if place else usage.value.digital_signature
        if not allowed:
            raise AttestationError(f"the key of {who} must be for such signatures")
    for extension in extensions.values():
        if extension.critical and extension.oid != x509.OID_EXTENDED_KEY_USAGE:
            raise AttestationError(f"the certificate of {who} must have no unknown critical part",
                                   got=extension.oid.dotted_string)  # fmt: skip


def _check_revoked(
    one: x509.Certificate,
    issuer: x509.Certificate,
    crls: Sequence[x509.CertificateRevocationList],
    now: datetime.datetime,
) -> None:
    for crl in crls:
        if crl.issuer != issuer.subject:
            continue
        try:
            key: Any = issuer.public_key()
            good = bool(crl.is_signature_valid(key))
        except (UnsupportedAlgorithm, TypeError, ValueError):
            good = False
        ends = crl.next_update_utc
        if not good or crl.last_update_utc > now or (ends is not None and ends < now):
            raise AttestationError("a revocation list must be signed and of today",
                                   got=issuer.subject.rfc4514_string(),
                                   next_step="fetch the list again")  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            revoked = crl.get_revoked_certificate_by_serial_number(one.serial_number)
        if revoked is not None:
            raise AttestationError("a certificate must not be revoked",
                                   got=one.subject.rfc4514_string())  # fmt: skip


def verify_ecdsa(
    key: object, r: int, s: int, data: bytes, curve: type[ec.EllipticCurve], what: str
) -> None:
    """A signature by an elliptic curve of exactly this kind, over the hash of its own size.

    Raises:
        AttestationError: another kind of key, or a signature that does not hold.
    """
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, curve):
        raise AttestationError(f"{what} must be signed by a key on {curve.name}")
    size = hashes.SHA256() if curve is ec.SECP256R1 else hashes.SHA384()
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(size))
    except (InvalidSignature, ValueError):
        raise AttestationError(f"the signature of {what} must hold") from None
