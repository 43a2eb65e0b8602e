"""Intel's judgement of a TDX platform: levels, the module's identity, signature, dates."""

import copy
import dataclasses
import datetime
import json

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from hotloop.enclave.attestation import Policy, verify
from hotloop.enclave.attestation.tcb_info import TcbInfo
from hotloop.errors import AttestationError, InputError
from support.evidence import NONCE, NOW_S, issue, root, sev_snp, sign, tdx

NONE = "00" * 48


def level(status, *, cpu=5, pce=11, module=(7, 1, 3)):
    """What the platform of the tests has (see ``tdx``), unless a part is said to be higher."""
    return {
        "tcb": {
            "sgxtcbcomponents": [{"svn": cpu}] * 16, "pcesvn": pce,
            "tdxtcbcomponents": [{"svn": svn} for svn in (*module, *[0] * 13)],
        },
        "tcbDate": "2026-03-13T00:00:00Z", "tcbStatus": status,
    }  # fmt: skip


def document(*levels, module="UpToDate", least=7):
    def day(days):
        at = datetime.datetime.fromtimestamp(NOW_S, datetime.UTC) + datetime.timedelta(days=days)
        return at.isoformat().replace("+00:00", "Z")

    return {
        "id": "TDX", "version": 3, "issueDate": day(-1), "nextUpdate": day(29),
        "fmspc": "00806F050000", "pceId": "0000", "tcbType": 0, "tcbEvaluationDataNumber": 17,
        "tdxModule": {"mrsigner": NONE, "attributes": "00" * 8, "attributesMask": "FF" * 8},
        "tdxModuleIdentities": [
            {"id": "TDX_03", "mrsigner": NONE, "tcbLevels": []},
            {"id": "TDX_01", "mrsigner": NONE, "tcbLevels": [
                {"tcb": {"isvsvn": least}, "tcbStatus": module},
                {"tcb": {"isvsvn": 2}, "tcbStatus": "OutOfDate"}]},
        ],
        "tcbLevels": list(levels) or [level("UpToDate")],
    }  # fmt: skip


def files(made, *, by=None, days=(-10, 10)):
    """Intel's answer and its chain, signed by the tests' Intel."""
    (top, top_key), _ = root("Intel", ec.SECP256R1)
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = issue("TCB signing", key, by or (top, top_key), ca=False, days=days)
    body = json.dumps(made, separators=(",", ":")).encode()
    r, s = sign(key, body, hashes.SHA256)
    signature = (r.to_bytes(32, "big") + s.to_bytes(32, "big")).hex()
    answer = b'{"tcbInfo":' + body + b',"signature":"' + signature.encode() + b'"}'
    return answer, b"".join(c.public_bytes(Encoding.PEM) for c in (leaf, top))


def status(made=None, *, quote=None, allowed=("UpToDate",), now_s=NOW_S, answer=None, **options):
    quote = quote or tdx()
    files_ = files(made or document(), **options)
    info = TcbInfo.load(answer(files_[0]) if answer else files_[0], files_[1], "it")
    policy = dataclasses.replace(quote.policy, tcb_info=(info,), tcb_status=frozenset(allowed))
    return verify(quote.evidence, policy=policy, nonce=NONCE, now_s=now_s).tcb_status


def refused(match, made=None, **options):
    with pytest.raises(AttestationError, match=match):
        status(made, **options)


def test_a_platform_up_to_date():
    assert status() == "UpToDate"
    assert status(quote=tdx(version=5)) == "UpToDate"
    assert verify(tdx().evidence, policy=tdx().policy, nonce=NONCE, now_s=NOW_S).tcb_status is None


def test_the_first_level_that_is_reached_counts():
    for higher in ({"cpu": 6}, {"pce": 12}, {"module": (0, 0, 4)}):
        made = document(level("UpToDate", **higher), level("OutOfDate"))
        refused("status of the platform must be one that the policy allows; got OutOfDate", made)
        assert status(made, allowed=("UpToDate", "OutOfDate")) == "OutOfDate"
        refused("got NotSupported", document(level("UpToDate", **higher)))
    # From its second version on the module's own versions are judged by its identity.
    assert status(document(level("UpToDate", module=(200, 200, 3)))) == "UpToDate"
    made = document(level("SWHardeningNeeded"))
    refused("got SWHardeningNeeded", made)
    assert status(made, allowed=("UpToDate", "SWHardeningNeeded")) == "SWHardeningNeeded"


def test_the_module_has_a_status_of_its_own():
    refused("status of the TDX module .* got OutOfDate", document(least=8))
    refused("status of the TDX module .* got Revoked", document(module="Revoked"))
    refused("status of the TDX module .* got NotSupported", document(least=8),
            quote=tdx(module_svn=1))  # fmt: skip
    other = document()
    other["tdxModuleIdentities"][1]["mrsigner"] = "11" * 48
    refused("status of the TDX module .* got NotSupported", other)
    other = document()
    other["tdxModuleIdentities"].pop(1)
    refused("status of the TDX module .* got NotSupported", other)


def test_who_signed_and_when():
    refused("signature of Intel's TCB info", answer=lambda a: a.replace(b"OutOfDate", b"UpToDate"))
    key = ec.generate_private_key(ec.SECP256R1())
    stranger = (issue("stranger", key), key)
    refused("signed by the next one", by=stranger)
    refused("valid now", days=(-10, -1))
    day = 86400
    refused("of today", now_s=NOW_S - 2 * day)
    made = document()
    made["nextUpdate"] = made["issueDate"]
    refused("of today", made)
    made = document()
    made["fmspc"] = "00806F050001"
    refused("about the platform's processor; got 00806f050000", made)


def test_answers_of_another_form():
    answer, chain = files(document())
    for wrong in (b"", b"{}", answer[:-2], answer + b"x", b" " + answer,
                  answer.replace(b'"TDX"', b'"SGX"'), answer.replace(b'n":3', b'n":2'),
                  answer.replace(b"00806F050000", b"00806F05000g")):  # fmt: skip
        with pytest.raises(InputError, match="TCB info of TDX, version 3"):
            TcbInfo.load(wrong, chain, "it")
    with pytest.raises(InputError, match="must be certificates"):
        TcbInfo.load(answer, b"", "it")
    with pytest.raises(InputError, match="kind tdx has tcb_info"):
        dataclasses.replace(sev_snp().policy, tcb_info=(TcbInfo.load(answer, chain, "it"),))
    for name in ("nextUpdate", "issueDate", "tcbLevels", "tdxModuleIdentities"):
        for value in (None, 5, "x", [5], [{}], [{"tcb": {}}]):
            made = copy.deepcopy(document())
            made[name] = value
            refused("must have its fields", made)


def test_files_of_a_policy(tmp_path):
    answer, chain = files(document())
    (tmp_path / "tcb.json").write_bytes(answer)
    (tmp_path / "tcb.pem").write_bytes(chain)
    quote = tdx()
    (tmp_path / "root.pem").write_bytes(quote.policy.roots[0].public_bytes(Encoding.PEM))
    table = {
        "kind": "tdx", "roots": ["root.pem"], "tcb_info": ["tcb.json"],
        "tcb_info_chain": ["tcb.pem"], "measurements": {"MRTD": [(b"d" * 48).hex()]},
    }  # fmt: skip
    policy = Policy.from_table(table, tmp_path)
    claims = verify(quote.evidence, policy=policy, nonce=NONCE, now_s=NOW_S)
    assert claims.tcb_status == "UpToDate"
    for name, value, match in (
        ("tcb_info", 5, "list of texts"), ("tcb_info", ["none"], "must be readable"),
        ("measurements", 5, "must be a table"), ("max_age_s", "x", "number of seconds"),
        ("max_age_s", 0, "above 0"), ("roots", ["tcb.json"], "must be certificates"),
        ("crls", ["tcb.pem"], "must be a revocation list"), ("minimum", 5, "a policy has the keys"),
        ("measurements", {"MRTD": ["xy"]}, "must be hexadecimal"),
        ("min_tcb", {"qe_svn": -1}, "whole number"), ("allow_debug", 1, "true or false"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            Policy.from_table({**table, name: value}, tmp_path)
