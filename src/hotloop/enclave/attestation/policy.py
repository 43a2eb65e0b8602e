"""What an owner asks of an enclave, and what verified evidence says of one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography import x509

from ...errors import AttestationError, InputError
from .certificates import load_certificates, load_crl
from .tcb_info import TcbInfo

KINDS = ("tpm", "nitro", "sev-snp", "tdx")
# The register that tells which program it is; a policy that leaves it open lets any program in.
_PROGRAM = {"nitro": "PCR0", "sev-snp": "MEASUREMENT", "tdx": "MRTD"}
_MIN_NONCE_BYTES, _MAX_NONCE_BYTES = 16, 64


@dataclass(frozen=True)
class Claims:
    """What evidence says once every signature in it is verified.

    Attributes:
        kind: one of ``KINDS``.
        measurements: registers by name, for example ``PCR0`` or ``MRTD``.
        debug: whether its memory can be read from outside; ``None``: this kind does not say.
        tcb: versions of what the hardware maker must update, by name.
        signer: SHA-256 of the public key that signed, hexadecimal; of a TPM: the key's name.
        root_sha256: of the root certificate that vouches; ``None``: the key itself is listed.
        made_at_s: seconds since 1970; ``None``: this kind does not say.
        public_key: that the evidence carries; ``None`` where the kind has no field for it.
        user_data: likewise.
        tcb_status: Intel's word for the platform's versions; ``None``: nobody was asked.
    """

    kind: str
    measurements: Mapping[str, bytes]
    debug: bool | None
    tcb: Mapping[str, int]
    signer: str
    root_sha256: str | None
    made_at_s: float | None = None
    public_key: bytes | None = None
    user_data: bytes | None = None
    tcb_status: str | None = None


@dataclass(frozen=True)
class Policy:
    """What evidence must say to be accepted.

    Attributes:
        kind: one of ``KINDS``; evidence of another kind is not looked at.
        measurements: allowed values of each named register; registers not named are not compared.
        roots: certificates that may vouch. There is no default: the owner chooses whom to trust.
        keys: names of TPM attestation keys that are trusted as they are.
        crls: revocation lists; a certificate that one of them names is refused.
        min_tcb: smallest versions, by the names in ``Claims.tcb``.
        tcb_info: Intel's judgements of TDX platforms, by kind of processor; empty: not asked.
        tcb_status: Intel's words that are enough, for example also ``SWHardeningNeeded``.
        allow_debug: accept enclaves whose memory can be read from outside.
        max_age_s: of evidence that says when it was made.

    Raises:
        InputError: nothing vouches, no program is named, or a kind is unknown.
    """

    kind: str
    measurements: Mapping[str, frozenset[bytes]]
    roots: tuple[x509.Certificate, ...] = ()
    keys: frozenset[bytes] = frozenset()
    crls: tuple[x509.CertificateRevocationList, ...] = ()
    min_tcb: Mapping[str, int] = field(default_factory=dict)
    tcb_info: tuple[TcbInfo, ...] = ()
    tcb_status: frozenset[str] = frozenset({"UpToDate"})
    allow_debug: bool = False
    max_age_s: float = 300.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"the kind of a policy must be one of {', '.join(KINDS)}",
                             got=self.kind)  # fmt: skip
        if not self.roots and not (self.keys and self.kind == "tpm"):
            raise InputError("a policy must name at least one root that may vouch",
                             next_step="give roots = [...]; of a TPM also keys")  # fmt: skip
        if self.tcb_info and self.kind != "tdx":
            raise InputError("only a policy of kind tdx has tcb_info", got=self.kind)
        if self.keys and self.kind != "tpm":
            raise InputError("only a policy of kind tpm lists keys", got=self.kind)
        program = _PROGRAM.get(self.kind)
        if not self.measurements or (program is not None and program not in self.measurements):
            raise InputError(
                f"a policy of kind {self.kind} must say which values of {program or 'PCRs'} it "
                "allows: without, any program is let in"
            )
        for name, allowed in self.measurements.items():
            if not allowed or not all(allowed):
                raise InputError("a measurement must have at least one allowed value", got=name)
        if not self.max_age_s > 0:
            raise InputError("max_age_s must be above 0", got=self.max_age_s)

    def admit(self, claims: Claims, now_s: float) -> Claims:
        """The claims, if they are allowed; their signatures are verified already.

        Raises:
            AttestationError: debug, a measurement, a version or the age is not allowed.
        """
        if claims.debug and not self.allow_debug:
            raise AttestationError("an enclave in debug mode is not accepted: its memory is open",
                                   next_step="start it without debug")  # fmt: skip
        for name, allowed in self.measurements.items():
            value = claims.measurements.get(name)
            if value is None:
                raise AttestationError(f"the evidence must have the measurement {name}",
                                       got=", ".join(claims.measurements))  # fmt: skip
            if not any(hmac.compare_digest(value, one) for one in allowed):
                raise AttestationError(f"{name} must be a measurement that the policy allows",
                                       got=value.hex())  # fmt: skip
        for name, least in self.min_tcb.items():
            version = claims.tcb.get(name)
            if version is None or version < least:
                raise AttestationError(f"the version of {name} must be at least {least}",
                                       got="none" if version is None else version,
                                       next_step="update the host's firmware")  # fmt: skip
        if claims.made_at_s is not None:
            age_s = now_s - claims.made_at_s
            if not -60 <= age_s <= self.max_age_s:
                raise AttestationError(f"evidence must be at most {self.max_age_s:g} s old",
                                       got=f"{age_s:.0f} s")  # fmt: skip
        return claims

    @classmethod
    def from_table(cls, table: Mapping[str, Any], folder: Path) -> Policy:
        """A policy from a table of a TOML file; its files are sought from ``folder``.

        Raises:
            InputError: a key is unknown, a value has another type, or a file cannot be read.
        """
        known = {"kind", "measurements", "roots", "keys", "crls", "min_tcb", "tcb_info",
                 "tcb_info_chain", "tcb_status", "allow_debug", "max_age_s"}  # fmt: skip
        unknown = sorted(set(table) - known)
        if unknown:
            raise InputError(f"a policy has the keys {', '.join(sorted(known))}", got=unknown[0])
        measurements = {
            name: frozenset(_hex(name, value) for value in _list(f"measurements.{name}", values))
            for name, values in _table("measurements", table.get("measurements", {})).items()
        }
        min_tcb = _table("min_tcb", table.get("min_tcb", {}))
        for name, least in min_tcb.items():
            if type(least) is not int or least < 0:
                raise InputError(f"min_tcb.{name} must be a whole number of at least 0", got=least)
        allow_debug = table.get("allow_debug", False)
        if type(allow_debug) is not bool:
            raise InputError("allow_debug must be true or false", got=allow_debug)
        max_age_s = table.get("max_age_s", 300.0)
        if type(max_age_s) not in (int, float):
            raise InputError("max_age_s must be a number of seconds", got=max_age_s)
        return cls(
            kind=str(table.get("kind", "")),
            measurements=MappingProxyType(measurements),
            roots=tuple(
                one
                for name in _list("roots", table.get("roots", []))
                for one in load_certificates(_read(folder / name), what=name)
            ),
            keys=frozenset(_hex("keys", key) for key in _list("keys", table.get("keys", []))),
            crls=tuple(
                load_crl(_read(folder / name), what=name)
                for name in _list("crls", table.get("crls", []))
            ),
            min_tcb=MappingProxyType(min_tcb),
            tcb_info=_tcb_infos(table, folder),
            tcb_status=frozenset(_list("tcb_status", table.get("tcb_status", ["UpToDate"]))),
            allow_debug=allow_debug,
            max_age_s=float(max_age_s),
        )


def check_nonce(field_of_evidence: bytes, nonce: bytes) -> None:
    """The field of the evidence must be the nonce, with zeros behind it where it is longer.

    Raises:
        AttestationError: it is another one: made for another challenge, or for another key.
        InputError: the nonce asked for is too short or too long.
    """
    if not _MIN_NONCE_BYTES <= len(nonce) <= _MAX_NONCE_BYTES:
        raise InputError(f"a nonce must have {_MIN_NONCE_BYTES} to {_MAX_NONCE_BYTES} bytes",
                         got=len(nonce))  # fmt: skip
    wanted = nonce.ljust(len(field_of_evidence), b"\0")
    if not hmac.compare_digest(field_of_evidence, wanted):
        raise AttestationError(
            "evidence must hold the nonce of this challenge and key", got=field_of_evidence.hex()
        )


def bind(purpose: str, challenge: bytes, public_key: bytes) -> bytes:
    """The nonce of evidence that vouches for a key: 32 bytes, SHA-256 of all three.

    Args:
        purpose: what the key is used for; evidence for one purpose does not serve another.
        challenge: fresh bytes of who verifies.
        public_key: as it is sent or shown.
    """
    digest = hashlib.sha256(b"hotloop attestation v1\0")
    for part in (purpose.encode(), challenge, public_key):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def _tcb_infos(table: Mapping[str, Any], folder: Path) -> tuple[TcbInfo, ...]:
    names = _list("tcb_info", table.get("tcb_info", []))
    if not names:
        return ()
    chain = b"".join(
        _read(folder / name) for name in _list("tcb_info_chain", table.get("tcb_info_chain", []))
    )
    return tuple(TcbInfo.load(_read(folder / name), chain, name) for name in names)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} must be readable", got=error.strerror) from None


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} must be a table", got=value)
    return value


def _list(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InputError(f"{name} must be a list of texts", got=value)
    return value


def _hex(name: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InputError(f"{name} must be hexadecimal", got=text) from None
