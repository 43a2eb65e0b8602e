"""Versions in the certificate of an Intel platform (PCK).

The format: Intel, "SGX PCK Certificate and Certificate Revocation List Profile Specification":
one extension, a sequence of pairs of an object identifier and a value.
"""

from __future__ import annotations

from cryptography import x509

from ...errors import AttestationError

_SGX = "1.2.840.113741.1.13.1"
_TCB = bytes.fromhex("2a864886f84d010d0102")  # _SGX + .2, as DER writes it.
_FMSPC = bytes.fromhex("2a864886f84d010d0104")
_SEQUENCE, _OID, _INTEGER, _OCTETS = 0x30, 0x06, 0x02, 0x04


def platform_versions(leaf: x509.Certificate) -> tuple[dict[str, int], bytes]:
    """``cpu_svn_1`` to ``cpu_svn_16`` and ``pce_svn``; and FMSPC, the kind of processor.

    Raises:
        AttestationError: the certificate does not have them.
    """
    try:
        extension = leaf.extensions.get_extension_for_oid(x509.ObjectIdentifier(_SGX))
        value = extension.value
        assert isinstance(value, x509.UnrecognizedExtension)
        outer = _pairs(value.value)
        inner = _pairs(outer[_TCB])
        found = {f"cpu_svn_{i}": _number(inner[_TCB + bytes([i])]) for i in range(1, 17)}
        found["pce_svn"] = _number(inner[_TCB + bytes([17])])
        return found, _value(outer[_FMSPC], _OCTETS)
    except (x509.ExtensionNotFound, KeyError, ValueError, AssertionError):
        raise AttestationError("the platform's certificate must have Intel's versions") from None


def _pairs(der: bytes) -> dict[bytes, bytes]:
    """A sequence of sequences of an identifier and a value: values, still in DER."""
    found = {}
    for pair in _split(_value(der, _SEQUENCE)):
        name, value = _split(_value(pair, _SEQUENCE))
        found[_value(name, _OID)] = value
    return found


def _number(der: bytes) -> int:
    return int.from_bytes(_value(der, _INTEGER), "big")


def _value(der: bytes, tag: int) -> bytes:
    parts = _split(der)
    if len(parts) != 1 or der[0] != tag:
        raise ValueError("tag")
    return der[2 if der[1] < 128 else 2 + (der[1] & 127) :]


def _split(der: bytes) -> list[bytes]:
    """DER values that lie one behind the other."""
    parts = []
    while der:
        if len(der) < 2:
            raise ValueError("length")
        size, head = der[1], 2
        if size > 127:
            head = 2 + (size & 127)
            size = int.from_bytes(der[2:head], "big")
        if head + size > len(der):
            raise ValueError("length")
        parts.append(der[: head + size])
        der = der[head + size :]
    return parts
