"""Evidence of each kind, made with keys and roots of the tests': what a maker signs, we sign."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Callable
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hotloop.enclave.attestation import Policy, cbor, tpm

NOW_S = 1_800_000_000.0
NONCE = bytes(range(32))
_AMD = "1.3.6.1.4.1.3704.1."
CHIP = bytes(range(100, 164))
TCB = {"bootloader": 4, "tee": 0, "snp": 23, "microcode": 210}
QE_SIGNER = bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5")
INTEL = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")


def issue(name, key, issuer=None, *, ca=True, days=(-10, 10), extensions=(), hours=None,
          path_length=None, pss=False, may_certify=None):  # fmt: skip
    """A certificate of ``key``, signed by ``issuer`` (certificate and key) or by itself."""
    may_certify = ca if may_certify is None else may_certify
    now = datetime.datetime.fromtimestamp(NOW_S, datetime.UTC)
    by_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(by_name)
        .issuer_name(issuer[0].subject if issuer else by_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca, path_length if ca else None), critical=True)
        .add_extension(x509.KeyUsage(
            digital_signature=not may_certify, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=may_certify, crl_sign=ca,
            encipher_only=False, decipher_only=False), critical=True)
    )  # fmt: skip
    for oid, value, critical in extensions:
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
        builder = builder.add_extension(unknown, critical=critical)
    signer = issuer[1] if issuer else key
    scheme = padding.PSS(padding.MGF1(hashes.SHA384()), 48) if pss else None
    return builder.sign(signer, hashes.SHA384(), rsa_padding=scheme)


def der(certificate):
    return certificate.public_bytes(Encoding.DER)


@cache
def root(name="root", curve=ec.SECP384R1):
    """A root and one below it, as pairs of certificate and key; made once for each name."""
    top, middle = ec.generate_private_key(curve()), ec.generate_private_key(curve())
    above = issue(f"{name} root", top)
    return (above, top), (issue(f"{name} middle", middle, (above, top)), middle)


def sign(key, data, hash_=hashes.SHA384):
    return decode_dss_signature(key.sign(data, ec.ECDSA(hash_())))


@dataclasses.dataclass(frozen=True)
class Made:
    """Evidence, and a policy that accepts it."""

    evidence: bytes
    policy: Policy


def _policy(kind, register, value, top, **more):
    return Policy(kind, {register: frozenset([value])}, roots=(top,), **more)


# --- SEV-SNP


def der_integer(value):
    return b"\x02\x01" + bytes([value]) if value < 128 else b"\x02\x02\0" + bytes([value])


def chip_certificate(key, issuer, *, tcb=None, chip=CHIP, **more):
    oids = {"bootloader": "3.1", "tee": "3.2", "snp": "3.3", "microcode": "3.8", "fmc": "3.9"}
    extensions = [(_AMD + oids[name], der_integer(value), False)
                  for name, value in (tcb or TCB).items()]  # fmt: skip
    if chip is not None:
        extensions.append((_AMD + "4", chip, False))
    return issue("SEV-VCEK", key, issuer, ca=False, extensions=extensions, **more)


def snp_report(*, nonce=NONCE, debug=False, version=2, measurement=b"m" * 48, flags=0, tcb=None,
               chip=CHIP, family=0x19, vmpl=0):  # fmt: skip
    tcb = tcb or TCB
    if "fmc" in tcb:
        order = ("fmc", "bootloader", "tee", "snp", None, None, None, "microcode")
    else:
        order = ("bootloader", "tee", None, None, None, None, "snp", "microcode")
    report = bytearray(0x2A0)
    report[0:4] = version.to_bytes(4, "little")
    report[0x08:0x10] = (0x30000 | (1 << 19) * debug).to_bytes(8, "little")
    report[0x30:0x34] = vmpl.to_bytes(4, "little")
    report[0x34:0x38] = (1).to_bytes(4, "little")
    report[0x48:0x4C] = flags.to_bytes(4, "little")
    report[0x50:0x90] = nonce.ljust(64, b"\0")
    report[0x90:0xC0] = measurement
    report[0x180:0x188] = bytes(tcb[name] if name else 0 for name in order)
    report[0x188] = family if version >= 3 else 0
    report[0x1A0:0x1E0] = chip.ljust(64, b"\0")
    return bytes(report)


def snp_signed(report, key):
    r, s = sign(key, report)
    return (report + r.to_bytes(72, "little") + s.to_bytes(72, "little")).ljust(1184, b"\0")


@cache
def _chip_key():
    return ec.generate_private_key(ec.SECP384R1())


def sev_snp(*, authority="AMD", leaf=None, leaf_options=None, **options) -> Made:
    """A report and its chain; ``leaf_options`` go to the chip's certificate."""
    (top, _), middle = root(authority)
    key = _chip_key()
    leaf = leaf or chip_certificate(key, middle, **(leaf_options or {}))
    report = snp_signed(snp_report(**options), key)
    evidence = report + der(leaf) + der(middle[0])
    return Made(evidence, _policy("sev-snp", "MEASUREMENT", b"m" * 48, top))


# --- TDX


def _tlv(tag, body):
    size = bytes([len(body)]) if len(body) < 128 else b"\x82" + len(body).to_bytes(2, "big")
    return bytes([tag]) + size + body


def pck_extension(svn=5, fmspc=b"\0\x80\x6f\x05\0\0"):
    base = bytes.fromhex("2a864886f84d010d01")

    def pair(oid, value):
        return _tlv(0x30, _tlv(0x06, base + oid) + value)

    tcb = b"".join(pair(b"\x02" + bytes([i]), _tlv(2, bytes([svn]))) for i in range(1, 17))
    tcb += pair(b"\x02\x11", _tlv(2, bytes([11]))) + pair(b"\x02\x12", _tlv(4, bytes(16)))
    return _tlv(0x30, pair(b"\x01", _tlv(4, bytes(16))) + pair(b"\x02", _tlv(0x30, tcb))
                + pair(b"\x04", _tlv(4, fmspc)))  # fmt: skip


@cache
def _tdx_keys():
    return tuple(ec.generate_private_key(ec.SECP256R1()) for _ in range(3))


def _raw(key):
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def _p256(key, data):
    r, s = sign(key, data, hashes.SHA256)
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def tdx(*, version=4, nonce=NONCE, debug=False, mrtd=b"d" * 48, authority="Intel",
        qe_signer=QE_SIGNER, qe_debug=False, qe_product=2, other_key=False, kind=0x81,
        vendor=INTEL, module_svn=7, days=(-10, 10)) -> Made:  # fmt: skip
    """A quote of version 4, or of version 5 with the longer body of TD 1.5."""
    (top, _), middle = root(authority, ec.SECP256R1)
    key, platform, stranger = _tdx_keys()
    leaf = issue("PCK", platform, middle, ca=False, days=days,
                 extensions=[("1.2.840.113741.1.13.1", pck_extension(), False)])  # fmt: skip
    header = version.to_bytes(2, "little") + (2).to_bytes(2, "little") + kind.to_bytes(4, "little")
    header += bytes(4) + vendor + bytes(20)
    body = bytes([module_svn, 1, 3]).ljust(16, b"\0") + b"s" * 48 + bytes(48) + bytes(8)
    body += int(debug).to_bytes(8, "little") + (0xE7).to_bytes(8, "little") + mrtd
    body += bytes(3 * 48) + b"".join(bytes([i]) * 48 for i in range(4)) + nonce.ljust(64, b"\0")
    if version == 5:
        body += bytes([module_svn, 1, 3]).ljust(16, b"\0") + bytes(48)
        header += (3).to_bytes(2, "little") + len(body).to_bytes(4, "little")
    authentication = bytes(range(32))
    bound = hashlib.sha256(_raw(stranger if other_key else key) + authentication).digest()
    attributes = bytes([5 | 2 * qe_debug]).ljust(16, b"\0")
    report = bytes(48) + attributes + bytes(64) + qe_signer + bytes(96)
    report += qe_product.to_bytes(2, "little") + (8).to_bytes(2, "little") + bytes(60)
    report += bound.ljust(64, b"\0")
    pem = b"".join(c.public_bytes(Encoding.PEM) for c in (leaf, middle[0], top))
    inner = report + _p256(platform, report) + len(authentication).to_bytes(2, "little")
    inner += authentication + (5).to_bytes(2, "little") + len(pem).to_bytes(4, "little") + pem
    tail = _p256(key, header + body) + _raw(key) + (6).to_bytes(2, "little")
    tail += len(inner).to_bytes(4, "little") + inner
    evidence = header + body + len(tail).to_bytes(4, "little") + tail
    return Made(evidence, _policy("tdx", "MRTD", b"d" * 48, top))


# --- Nitro


@cache
def _nitro_key():
    return ec.generate_private_key(ec.SECP384R1())


def nitro(*, nonce=NONCE, pcr0=b"n" * 48, authority="AWS", made_at_s=NOW_S - 5, days=(-1, 1),
          public_key=b"key", tag=b"", change: Callable | None = None,
          protected=None) -> Made:  # fmt: skip
    """A document; ``change`` may alter its payload before it is signed."""
    (top, _), middle = root(authority)
    key = _nitro_key()
    leaf = issue("enclave", key, middle, ca=False, days=days)
    payload = {
        "module_id": "i-0-enc0", "digest": "SHA384", "timestamp": int(made_at_s * 1000),
        "pcrs": {0: pcr0} | {i: bytes([i]) * 48 for i in range(1, 16)},
        "certificate": der(leaf), "cabundle": [der(top), der(middle[0])],
        "public_key": public_key, "user_data": None, "nonce": nonce,
    }  # fmt: skip
    if change:
        change(payload)
    body = payload if isinstance(payload, bytes) else cbor.encode(payload)
    protected = protected or cbor.encode({1: -35})
    r, s = sign(key, cbor.encode(["Signature1", protected, b"", body]))
    outer = [protected, {}, body, r.to_bytes(48, "big") + s.to_bytes(48, "big")]
    return Made(tag + cbor.encode(outer), _policy("nitro", "PCR0", b"n" * 48, top))


# --- TPM


def _two(value):
    return value.to_bytes(2, "big")


def _sized(data):
    return _two(len(data)) + data


@cache
def _tpm_key(kind="ecc"):
    if kind == "ecc":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, 2048)


def tpm_public(kind="ecc", *, attributes=0x50072, scheme=None):
    numbers = _tpm_key(kind).public_key().public_numbers()
    head = _two(0x23 if kind == "ecc" else 1) + _two(0xB) + attributes.to_bytes(4, "big") + _two(0)
    scheme = scheme or {"ecc": 0x18, "rsa": 0x14, "pss": 0x16}[kind]
    head += _two(0x10) + _two(scheme) + _two(0xB)
    if kind == "ecc":
        point = _sized(numbers.x.to_bytes(32, "big")) + _sized(numbers.y.to_bytes(32, "big"))
        return head + _two(3) + _two(0x10) + point
    return head + _two(2048) + bytes(4) + _sized(numbers.n.to_bytes(256, "big"))


def tpm_name(public):
    return b"\0\x0b" + hashlib.sha256(public).digest()


def tpm_quote(*, kind="ecc", nonce=NONCE, pcrs=None, attributes=0x50072, authority=None,
              magic=0xFF544347, structure=0x8018, days=(-10, 10)) -> Made:  # fmt: skip
    """A quote; with an authority the key has a certificate, without it is listed."""
    pcrs = pcrs or {0: b"0" * 32, 7: b"7" * 32, 16: b"p" * 32}
    key, public = _tpm_key(kind), tpm_public(kind, attributes=attributes)
    select = sum(1 << place for place in pcrs).to_bytes(3, "little")
    values = b"".join(pcrs[place] for place in sorted(pcrs))
    attest = magic.to_bytes(4, "big") + _two(structure) + _sized(b"\0\x0b" + b"q" * 32)
    attest += _sized(nonce) + bytes(8 + 4 + 4 + 1) + (7).to_bytes(8, "big")
    attest += (1).to_bytes(4, "big") + _two(0xB) + b"\x03" + select
    attest += _sized(hashlib.sha256(values).digest())
    if kind == "ecc":
        r, s = sign(key, attest, hashes.SHA256)
        signature = _two(0x18) + _two(0xB)
        signature += _sized(r.to_bytes(32, "big")) + _sized(s.to_bytes(32, "big"))
    else:
        scheme = padding.PKCS1v15() if kind == "rsa" else padding.PSS(
            padding.MGF1(hashes.SHA256()), 32)  # fmt: skip
        signature = _two(0x14 if kind == "rsa" else 0x16) + _two(0xB)
        signature += _sized(key.sign(attest, scheme, hashes.SHA256()))
    measurements = {"PCR16": frozenset([b"p" * 32])}
    if authority is None:
        policy = Policy("tpm", measurements, keys=frozenset([tpm_name(public)]))
        return Made(tpm.pack(attest, signature, public, values), policy)
    (top, _), middle = root(authority)
    leaf = issue("AK", key, middle, ca=False, days=days)
    chain = [der(leaf), der(middle[0])]
    return Made(tpm.pack(attest, signature, public, values, chain),
                Policy("tpm", measurements, roots=(top,)))  # fmt: skip


MAKERS = {
    "tpm": tpm_quote,
    "tpm-certified": lambda **options: tpm_quote(**({"authority": "TPM"} | options)),
    "nitro": nitro,
    "sev-snp": sev_snp,
    "tdx-4": tdx,
    "tdx-5": lambda **options: tdx(version=5, **options),
}
