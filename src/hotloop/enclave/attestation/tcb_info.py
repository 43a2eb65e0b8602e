"""Intel's judgement of a TDX platform's versions (TCB info, version 3).

The format: Intel, "Provisioning Certification Service for ECDSA Attestation", Get TDX TCB Info. The
owner fetches the answer and the chain in its header ``TCB-Info-Issuer-Chain``; both are files of
the policy. Which level a platform has: the first whose versions it reaches in every part.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ...errors import AttestationError, InputError
from .certificates import load_certificates, verify_chain, verify_ecdsa

# The signature is over the bytes as they came, so they are cut out and not written again.
_ANSWER = re.compile(r'\{"tcbInfo":(\{.*\}),"signature":"([0-9a-fA-F]{128})"\}\s*', re.DOTALL)
_PARTS = 16


@dataclass(frozen=True)
class TcbInfo:
    """One answer of Intel's, not verified yet.

    Attributes:
        body: the part that is signed, as it came.
        signature: 64 bytes.
        chain: who signed, from the signing certificate upwards.
        fmspc: the kind of processor that it is about.
    """

    body: bytes
    signature: bytes
    chain: tuple[x509.Certificate, ...]
    fmspc: bytes

    @classmethod
    def load(cls, answer: bytes, chain: bytes, what: str) -> TcbInfo:
        """From the bytes of both files.

        Raises:
            InputError: they are not an answer of that form.
        """
        found = _ANSWER.fullmatch(answer.decode("utf-8", "replace"))
        try:
            if found is None:
                raise ValueError("another form")
            document = json.loads(found[1])
            if (document["id"], document["version"]) != ("TDX", 3):
                raise ValueError(f"id {document['id']}, version {document['version']}")
            fmspc = bytes.fromhex(document["fmspc"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{what} must be Intel's TCB info of TDX, version 3",
                             got=error) from None  # fmt: skip
        certificates = tuple(load_certificates(chain, f"the chain of {what}"))
        return cls(found[1].encode(), bytes.fromhex(found[2]), certificates, fmspc)


@dataclass(frozen=True)
class Platform:
    """What is compared with Intel's levels.

    Attributes:
        fmspc: the kind of processor.
        cpu_svn: 16 versions of the processor's parts.
        pce_svn: version of the certifying enclave.
        module_svn: 16 versions of the TDX module (TEE_TCB_SVN).
        module_signer: MRSIGNERSEAM.
    """

    fmspc: bytes
    cpu_svn: Sequence[int]
    pce_svn: int
    module_svn: bytes
    module_signer: bytes


def check_status(
    infos: Sequence[TcbInfo],
    platform: Platform,
    allowed: frozenset[str],
    roots: Sequence[x509.Certificate],
    crls: Sequence[x509.CertificateRevocationList],
    now_s: float,
) -> str:
    """Intel's status of the platform, if it is one of ``allowed``.

    Raises:
        AttestationError: no answer is about this kind of processor, it is not signed or too old,
            or the status is another.
    """
    about = [one for one in infos if one.fmspc == platform.fmspc]
    if not about:
        raise AttestationError("a TCB info of the policy must be about the platform's processor",
                               got=platform.fmspc.hex(),
                               next_step="fetch Intel's TCB info for this FMSPC")  # fmt: skip
    info = about[0]
    verify_chain(info.chain, roots, now_s, crls)
    half = len(info.signature) // 2
    r, s = (int.from_bytes(part, "big") for part in (info.signature[:half], info.signature[half:]))
    verify_ecdsa(info.chain[0].public_key(), r, s, info.body, ec.SECP256R1, "Intel's TCB info")
    document = json.loads(info.body)
    try:
        until = datetime.datetime.fromisoformat(document["nextUpdate"]).timestamp()
        since = datetime.datetime.fromisoformat(document["issueDate"]).timestamp()
        status = _level(document["tcbLevels"], platform)
        module = _module(document, platform)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AttestationError("Intel's TCB info must have its fields", got=repr(error)) from None
    if not since <= now_s <= until:
        raise AttestationError("Intel's TCB info must be of today", got=document["nextUpdate"],
                               next_step="fetch it again")  # fmt: skip
    for part, found in (("platform", status), ("TDX module", module)):
        if found not in allowed:
            raise AttestationError(
                f"Intel's status of the {part} must be one that the policy allows",
                got=found,
                next_step="update its firmware",
            )
    return status


def _level(levels: list[dict[str, Any]], platform: Platform) -> str:
    # From its second version on the module is judged by itself: see ``_module``.
    first = 2 if platform.module_svn[1] else 0
    for level in levels:
        tcb = level["tcb"]
        cpu = [part["svn"] for part in tcb["sgxtcbcomponents"]]
        module = [part["svn"] for part in tcb["tdxtcbcomponents"]]
        if len(cpu) != _PARTS or len(module) != _PARTS:
            raise ValueError("parts")
        if (
            all(have >= least for have, least in zip(platform.cpu_svn, cpu, strict=True))
            and platform.pce_svn >= tcb["pcesvn"]
            and all(platform.module_svn[i] >= module[i] for i in range(first, _PARTS))
        ):
            return str(level["tcbStatus"])
    return "NotSupported"


def _module(document: dict[str, Any], platform: Platform) -> str:
    minor, major = platform.module_svn[0], platform.module_svn[1]
    if not major:
        signer = bytes.fromhex(document["tdxModule"]["mrsigner"])
        return "UpToDate" if signer == platform.module_signer else "NotSupported"
    for identity in document["tdxModuleIdentities"]:
        signer = bytes.fromhex(identity["mrsigner"])
        if identity["id"] == f"TDX_{major:02X}" and signer == platform.module_signer:
            for level in identity["tcbLevels"]:
                if minor >= level["tcb"]["isvsvn"]:
                    return str(level["tcbStatus"])
    return "NotSupported"
