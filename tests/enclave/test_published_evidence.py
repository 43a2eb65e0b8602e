"""Evidence that hardware made and its owners published, where the files are at hand.

They are other projects' files and stay out of this repository: ``HOTLOOP_EVIDENCE`` names a folder
with them. ``docs/attestation.md`` says where each is published; the hashes are of those files.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hotloop.enclave.attestation import Policy, cbor, tdx, verify
from hotloop.enclave.attestation.certificates import (
    load_certificate,
    load_certificates,
    load_crl,
)
from hotloop.enclave.attestation.tcb_info import TcbInfo
from hotloop.errors import AttestationError

FOLDER = os.environ.get("HOTLOOP_EVIDENCE")
pytestmark = pytest.mark.skipif(not FOLDER, reason="HOTLOOP_EVIDENCE names no folder")

# SHA-256 of the makers' root certificates, as they publish them.
AWS = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
INTEL = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
MILAN = "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"
_2025 = 1_750_000_000.0  # June 2025.
_2026 = 1_780_000_000.0  # June 2026.


def read(name: str, sha256: str) -> bytes:
    data = (Path(FOLDER) / name).read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256
    return data


def check(evidence, kind, register, value, root, nonce, now_s, *, debug=False):
    policy = Policy(kind, {register: frozenset([bytes.fromhex(value)])}, roots=(root,),
                    allow_debug=debug)  # fmt: skip
    claims = verify(evidence, policy=policy, nonce=nonce, now_s=now_s)
    assert claims.debug == debug
    for place in range(0, len(evidence), 97):
        flipped = bytearray(evidence)
        flipped[place] ^= 0x10
        with pytest.raises(AttestationError):
            verify(bytes(flipped), policy=policy, nonce=nonce, now_s=now_s)
    if debug:
        with pytest.raises(AttestationError, match="debug"):
            verify(evidence, policy=dataclasses.replace(policy, allow_debug=False), nonce=nonce,
                   now_s=now_s)  # fmt: skip
    return claims


@pytest.mark.parametrize(("report", "sha256", "vcek", "vcek_sha256", "measurement", "debug"), [
    ("snp_a.bin", "377e6241d3b373ab1df80c0f96978594e7e21f4797dd6ea95e2957e1c1e26060",
     "snp_a_vcek.der", "0d057f9b6e29a69eda9c0154b259567d291c1c08d73a11e9d31ace07c435b6d8",
     "b07af9620f3b839b47996422ddec6058338951d984e312115131ea82705eaf5b"
     "6bdf8a9ece31a5a608eb0cf2e4872b01", True),
    ("snp_b.bin", "3d956e9104969a038031a6b63dd6c4b60000619d37702065994f7da76f88ae7d",
     "snp_b_vcek.der", "3bbfb6ee259f75a95d13168cfdf2e034181bb93c7c016825731cbe8ea16c95e1",
     "7a1e5c266c0108dbc9bb94fa926951320940915d0aafb42464bd88b579ea158d"
     "3e1a0dc39b2c60bd95b9c480cd81841f", False),
], ids=["debug", "production"])  # fmt: skip
def test_amd_milan(report, sha256, vcek, vcek_sha256, measurement, debug):
    ask, ark = load_certificates(
        read("milan.pem", "22e62f8d2c21a156470145fc75f7b5a377cb053ced3e97f0bd3f8d8ca5941ce6"), "it"
    )
    body = read(report, sha256)
    if len(body) == 2 * 1184:
        body = bytes.fromhex(body.decode())
    evidence = body + read(vcek, vcek_sha256) + ask.public_bytes(Encoding.DER)
    claims = check(evidence, "sev-snp", "MEASUREMENT", measurement, ark, body[0x50:0x90], _2026,
                   debug=debug)  # fmt: skip
    assert claims.root_sha256 == MILAN


@pytest.mark.parametrize(("name", "sha256", "mrtd", "module_svn"), [
    ("tdx_v4_b.bin", "c42f9164325024bca2757bc8819b11879a0a369132ea4e2b7c85df4805ea72db",
     "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407"
     "de03ae6dc5f87f27428b2538873118b7", 6),
    ("tdx_v4_cos.bin", "54334c81b4e03634ab3a269ad397c9cea3b5c9ee96c57505b684470b964fd15e",
     "dae67181d3d65e073ad8f95b7907d5e927bfe9761c9ff3e9b89734a45d8954db"
     "a41394c7717cb2735396c1d04231f94a", 4),
    ("tdx_v5.bin", "cf77a6e91e48291d5d338c5f3b5d0674225a4d13e7d83ff5e537a4914bf22e1d",
     "7348651a34b2d2d3462822e3a750ec6110125f36757c78480bbfc69cc0d21fb0"
     "01a1ced3ee19747dda8f750c3bc8f876", 11),
])  # fmt: skip
def test_intel_tdx(name, sha256, mrtd, module_svn):
    pem = read("intel_root.pem", "194123d2a18be2beb525d0f0cc10a8998be1e63d7a0ecb723cb194f3e9833912")
    root = x509.load_pem_x509_certificate(pem)
    evidence = tdx.trim(read(name, sha256))
    start = 48 + 520 + (6 if evidence[0] == 5 else 0)
    claims = check(evidence, "tdx", "MRTD", mrtd, root, evidence[start : start + 64], _2026)
    assert claims.root_sha256 == INTEL
    assert claims.tcb["module_svn"] == module_svn


def test_intels_judgement_of_a_published_quote():
    """A quote and Intel's answers for it, of June 2025."""
    pem = read("intel_root.pem", "194123d2a18be2beb525d0f0cc10a8998be1e63d7a0ecb723cb194f3e9833912")
    sha256 = "c42f9164325024bca2757bc8819b11879a0a369132ea4e2b7c85df4805ea72db"
    quote = tdx.trim(read("tdx_v4_b.bin", sha256))
    collateral = read(
        "tdx_v4_b_collateral.json",
        "b0a5f5fd620a8881b1eda45261fdf30dd930b49aff93231556645c81fcb4c0bc",
    )
    found = json.loads(collateral)
    answer = f'{{"tcbInfo":{found["tcb_info"]},"signature":"{found["tcb_info_signature"]}"}}'
    info = TcbInfo.load(answer.encode(), found["tcb_info_issuer_chain"].encode(), "it")
    crls = tuple(load_crl(bytes.fromhex(found[name]), name) for name in ("root_ca_crl", "pck_crl"))
    policy = Policy("tdx", {"MRTD": frozenset([quote[48 + 136 : 48 + 184]])}, crls=crls,
                    roots=(x509.load_pem_x509_certificate(pem),), tcb_info=(info,))  # fmt: skip
    nonce = quote[568 : 568 + 64]
    july_2025 = 1_751_400_000.0
    claims = verify(quote, policy=policy, nonce=nonce, now_s=july_2025)
    assert claims.tcb_status == "UpToDate"
    with pytest.raises(AttestationError, match="of today"):
        verify(quote, policy=policy, nonce=nonce, now_s=_2026)


@pytest.mark.parametrize(("name", "sha256"), [
    ("nitro_n0.bin", "a150ce35c12236fbbc05416d83c91e217da750343db8c221aa1833602d277ae1"),
    ("nitro_n1.bin", "8056eefb696e0e5d178f9d6cb81f7ef0d4bb084cbac9507663b1a31d89e00385"),
])  # fmt: skip
def test_aws_nitro(name, sha256):
    """Documents of enclaves in debug mode, with a nonce; valid for three hours of their day."""
    evidence = read(name, sha256)
    payload = cbor.decode(cbor.decode(evidence, "it", tag=18)[2], "it")
    root = load_certificate(payload["cabundle"][0], "the root")
    claims = check(evidence, "nitro", "PCR0", "00" * 48, root, bytes(19) + b"\1",
                   payload["timestamp"] / 1000 + 1, debug=True)  # fmt: skip
    assert claims.root_sha256 == AWS
    assert claims.public_key == b"dummy"


def test_aws_nitro_of_a_production_enclave():
    """Without a nonce: all that is signed holds, and then it is refused as a replay would be."""
    evidence = read(
        "nitro_1.bin", "8e5652f3b009e62057c9ebe6237b804dc566708f8931f67d9fc2ccadaa293a9e"
    )
    payload = cbor.decode(cbor.decode(evidence, "it", tag=18)[2], "it")
    root = load_certificate(payload["cabundle"][0], "the root")
    policy = Policy("nitro", {"PCR0": frozenset([payload["pcrs"][0]])}, roots=(root,))
    with pytest.raises(AttestationError, match="nonce of this challenge"):
        verify(evidence, policy=policy, nonce=bytes(32), now_s=payload["timestamp"] / 1000 + 1)
    with pytest.raises(AttestationError, match="valid now"):
        verify(evidence, policy=policy, nonce=bytes(32), now_s=_2025)
