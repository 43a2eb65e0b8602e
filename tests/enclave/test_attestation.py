"""Evidence of each kind: accepted whole, refused for each thing that may be wrong with it."""

import dataclasses
import datetime
import hashlib

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from hotloop.enclave.attestation import Policy, bind, cbor, tpm, verify
from hotloop.errors import AttestationError, InputError
from support.evidence import (
    CHIP,
    MAKERS,
    NONCE,
    NOW_S,
    TCB,
    Made,
    chip_certificate,
    der,
    issue,
    nitro,
    root,
    sev_snp,
    snp_report,
    snp_signed,
    tdx,
    tpm_quote,
)

KINDS = list(MAKERS)


def accept(made: Made, *, nonce=NONCE, now_s=NOW_S, **policy):
    return verify(made.evidence, policy=dataclasses.replace(made.policy, **policy), nonce=nonce,
                  now_s=now_s)  # fmt: skip


def refuse(made: Made, match: str, **options):
    with pytest.raises(AttestationError, match=match) as caught:
        accept(made, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", KINDS)
def test_good_evidence_is_accepted(kind):
    made = MAKERS[kind]()
    claims = accept(made)
    assert claims.kind == made.policy.kind
    for name, allowed in made.policy.measurements.items():
        assert claims.measurements[name] in allowed
    if made.policy.roots:
        assert claims.root_sha256 == made.policy.roots[0].fingerprint(hashes.SHA256()).hex()
    else:
        assert claims.root_sha256 is None


@pytest.mark.parametrize("kind", KINDS)
def test_another_nonce_is_refused(kind):
    made = MAKERS[kind]()
    refuse(made, "nonce of this challenge", nonce=bytes(32))
    refuse(made, "nonce of this challenge", nonce=NONCE[:31])
    refuse(made, "nonce of this challenge", nonce=NONCE + b"x")
    with pytest.raises(InputError, match="16 to 64 bytes"):
        accept(made, nonce=NONCE[:15])


@pytest.mark.parametrize("kind", KINDS)
def test_another_measurement_is_refused(kind):
    made = MAKERS[kind]()
    for name in made.policy.measurements:
        refuse(made, f"{name} must be a measurement", measurements={name: frozenset([b"x" * 48])})
    more = {**made.policy.measurements, "PCR23": frozenset([b"x" * 32])}
    refuse(made, "must have the measurement PCR23", measurements=more)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tpm"])
def test_another_root_is_refused(kind):
    made = MAKERS[kind]()
    stranger = root("stranger")[0][0]
    refuse(made, "lead to a root|signed by the next one", roots=(stranger,))
    # The same name does not make it the same root.
    key = ec.generate_private_key(ec.SECP384R1())
    same_name = issue(made.policy.roots[0].subject.rfc4514_string()[3:], key)
    assert same_name.subject == made.policy.roots[0].subject
    refuse(made, "lead to a root|signed by the next one", roots=(same_name,))
    assert accept(made, roots=(stranger, *made.policy.roots))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tpm"])
def test_expired_certificates_are_refused(kind):
    made = MAKERS[kind]()
    for days in (-11, 11):
        refuse(made, "valid now", now_s=NOW_S + days * 86400)


@pytest.mark.parametrize("made", [
    sev_snp(debug=True), tdx(debug=True), tdx(version=5, debug=True), nitro(pcr0=bytes(48)),
], ids=["sev-snp", "tdx-4", "tdx-5", "nitro"])  # fmt: skip
def test_a_debug_enclave_is_refused_unless_asked_for(made):
    measurements = dict(made.policy.measurements)
    if made.policy.kind == "nitro":
        measurements["PCR0"] = frozenset([bytes(48)])
    refuse(made, "debug mode", measurements=measurements)
    assert accept(made, measurements=measurements, allow_debug=True).debug


def test_smallest_versions():
    for made, name, version in ((sev_snp(), "snp", 23), (tdx(), "module_svn", 7),
                                (tdx(), "cpu_svn_3", 5), (tdx(), "qe_svn", 8),
                                (tpm_quote(), "firmware", 7)):  # fmt: skip
        assert accept(made, min_tcb={name: version}).tcb[name] == version
        refuse(made, f"version of {name} must be at least {version + 1}",
               min_tcb={name: version + 1})  # fmt: skip
        refuse(made, "version of nothing", min_tcb={"nothing": 0})


def crl(issuer, key, serial, *, days=5, pss=False):
    now = datetime.datetime.fromtimestamp(NOW_S, datetime.UTC)
    revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
    scheme = padding.PSS(padding.MGF1(hashes.SHA384()), 48) if pss else None
    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now - datetime.timedelta(days=9))
        .next_update(now + datetime.timedelta(days=days))
        .add_revoked_certificate(revoked.build())
        .sign(key, hashes.SHA384(), rsa_padding=scheme)
    )


def test_a_revoked_certificate_is_refused():
    made = sev_snp()
    (top, top_key), middle = root("AMD")

    others = (crl(top, top_key, 1), crl(*middle, middle[0].serial_number))
    assert accept(made, crls=others)
    refuse(made, "must not be revoked", crls=(crl(top, top_key, middle[0].serial_number),))
    refuse(made, "signed and of today", crls=(crl(top, top_key, 1, days=-1),))
    refuse(made, "signed and of today", crls=(crl(top, middle[1], 1),))


def test_chains_that_must_not_be_used():
    (top, top_key), middle = root("AMD")
    key = ec.generate_private_key(ec.SECP384R1())
    report = snp_signed(snp_report(), key)
    policy = sev_snp().policy

    def chain(*certificates):
        return Made(report + b"".join(map(der, certificates)), policy)

    good = chip_certificate(key, middle)
    assert accept(chain(good, middle[0]))
    assert accept(chain(good, middle[0], top))
    refuse(chain(good), "lead to a root")
    refuse(chain(middle[0]), "must not be one that signs others")
    refuse(chain(good, top), "signed by the next one")
    # A leaf that signs another leaf.
    leaf_key = ec.generate_private_key(ec.SECP384R1())
    leaf = issue("leaf", leaf_key, middle, ca=False)
    refuse(chain(chip_certificate(key, (leaf, leaf_key)), leaf, middle[0]), "be one that signs")
    # A chain longer than its root allows.
    short_key = ec.generate_private_key(ec.SECP384R1())
    short = issue("short", short_key, (top, top_key), path_length=0)
    low_key = ec.generate_private_key(ec.SECP384R1())
    low = issue("low", low_key, (short, short_key))
    assert accept(chain(chip_certificate(key, (short, short_key)), short))
    refuse(chain(chip_certificate(key, (low, low_key)), low, short), "must be shorter")
    critical = issue("critical", low_key, (top, top_key), extensions=[("1.2.3.4", b"\5\0", True)])
    refuse(chain(chip_certificate(key, (critical, low_key)), critical), "unknown critical part")
    refuse(chain(*[good] * 9), "at most 8 certificates")


def test_what_a_key_may_be_used_for():
    (top, top_key), middle = root("AMD")
    key = ec.generate_private_key(ec.SECP384R1())
    report = snp_signed(snp_report(), key)
    policy = sev_snp().policy

    def chain(*certificates):
        return Made(report + b"".join(map(der, certificates)), policy)

    low_key = ec.generate_private_key(ec.SECP384R1())
    low = issue("low", low_key, (top, top_key), may_certify=False)
    refuse(chain(chip_certificate(key, (low, low_key)), low), "for such signatures")
    leaf = chip_certificate(key, middle, may_certify=True)
    refuse(chain(leaf, middle[0]), "for such signatures")
    other = ec.generate_private_key(ec.SECP256R1())
    refuse(chain(chip_certificate(other, middle), middle[0]), "by a key on secp384r1")
    good = chip_certificate(key, middle)
    refuse(Made(report + der(good)[:200], policy), "must be whole")
    refuse(Made(report + b"\x31" + der(good)[1:], policy), "certificates in DER")
    refuse(Made(report, policy), "must have 1 to 8 certificates")
    refuse(Made(report[:1000], policy), "must be whole; got")
    refuse(Made(report + der(good) + der(middle[0])[:-1], policy), "must be whole")


def test_the_unused_bits_of_a_signature():
    """The count of bits that are not used, before a certificate's signature, is not signed."""
    _, middle = root("AMD")
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = chip_certificate(key, middle)
    while leaf.signature[-1] & 1:  # Bits that are not used must be 0.
        leaf = chip_certificate(key, middle)
    raw = bytearray(der(leaf))
    place = raw.rindex(b"\0" + leaf.signature)
    raw[place] = 1
    report = snp_signed(snp_report(), key)
    policy = sev_snp().policy
    assert accept(Made(report + der(leaf) + der(middle[0]), policy))
    refuse(Made(report + bytes(raw) + der(middle[0]), policy), "must be a certificate")


def test_amd_signs_with_rsa_pss():
    keys = [rsa.generate_private_key(65537, 2048) for _ in range(2)]
    top = issue("ARK", keys[0], pss=True)
    middle = issue("ASK", keys[1], (top, keys[0]), pss=True)
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = chip_certificate(key, (middle, keys[1]), pss=True)
    evidence = snp_signed(snp_report(), key) + der(leaf) + der(middle)
    made = Made(evidence, dataclasses.replace(sev_snp().policy, roots=(top,)))
    assert accept(made).tcb == TCB
    assert accept(made, crls=(crl(top, keys[0], 1, pss=True),))
    refuse(made, "must not be revoked", crls=(crl(top, keys[0], middle.serial_number, pss=True),))
    refuse(made, "signed and of today", crls=(crl(top, keys[1], 1, pss=True),))


def test_sev_snp_reports():
    refuse(sev_snp(version=1), "version 2 to 5")
    refuse(sev_snp(flags=7 << 2), "chip's or the provider's key")
    refuse(sev_snp(flags=2), "chip's or the provider's key")
    refuse(sev_snp(vmpl=4), "of a guest")
    # The certificate of another chip, or of other versions of its firmware.
    refuse(sev_snp(leaf_options={"chip": bytes(64)}), "for the chip of the report")
    refuse(sev_snp(leaf_options={"chip": None}), "for the chip of the report")
    refuse(sev_snp(leaf_options={"tcb": TCB | {"snp": 22}}), "for the snp of the report")
    # A provider's key has no chip.
    assert accept(sev_snp(flags=1 << 2, leaf_options={"chip": None}))
    refuse(sev_snp(flags=1 << 2), "must not have a chip's certificate")
    # Turin: five versions in another order, and a chip of eight bytes.
    turin = TCB | {"fmc": 9}
    made = sev_snp(version=3, family=0x1A, tcb=turin, chip=CHIP[:8],
                   leaf_options={"tcb": turin, "chip": CHIP[:8]})  # fmt: skip
    assert accept(made).tcb == turin
    assert accept(sev_snp(vmpl=2)).measurements["VMPL"] == b"\2"


def test_tdx_quotes():
    assert accept(tdx()).measurements["RTMR2"] == b"\2" * 48
    assert accept(tdx()).measurements["FMSPC"].hex() == "00806f050000"
    refuse(tdx(version=3), "version 4 or 5")
    refuse(tdx(kind=0), "version 4 or 5")
    refuse(tdx(vendor=bytes(16)), "Intel's quoting enclave")
    refuse(tdx(qe_signer=bytes(32)), "must be Intel's")
    refuse(tdx(qe_product=1), "must be Intel's")
    refuse(tdx(qe_debug=True), "must be Intel's")
    refuse(tdx(other_key=True), "for the key of the quote")


def test_nitro_documents():
    claims = accept(nitro())
    assert (claims.public_key, claims.made_at_s) == (b"key", NOW_S - 5)
    assert accept(nitro(tag=b"\xd2"))
    refuse(nitro(tag=b"\xd1"), "tags")
    refuse(nitro(made_at_s=NOW_S - 301), "at most 300 s old")
    refuse(nitro(made_at_s=NOW_S + 61), "at most 300 s old")
    refuse(nitro(protected=cbor.encode({1: -7})), "ES384")
    for name in ("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"):
        for wrong in (None, [], b"", {}, "", 0):
            refuse(nitro(change=lambda d, n=name, w=wrong: d.update({n: w})), "field|certificate")
        refuse(nitro(change=lambda d, n=name: d.pop(n)), f"field {name}")
    refuse(nitro(change=lambda d: d["pcrs"].update({32: b"x" * 48})), "field pcrs")
    refuse(nitro(change=lambda d: d.update(user_data=b"x" * 1025)), "field user_data")
    refuse(nitro(change=lambda d: d.update(nonce=None)), "nonce of this challenge")
    with_text = nitro(change=lambda d: d.update(more="a field of tomorrow"))
    assert accept(with_text)


@pytest.mark.parametrize("kind", ["ecc", "rsa", "pss"])
def test_tpm_quotes(kind):
    assert accept(tpm_quote(kind=kind)).measurements["PCR7"] == b"7" * 32
    assert accept(tpm_quote(kind=kind, authority="TPM")).root_sha256
    refuse(tpm_quote(kind=kind), "one of the policy", keys=frozenset([b"\0\x0b" + bytes(32)]))
    refuse(tpm_quote(kind=kind, magic=0xFF544348), "that the TPM made")
    refuse(tpm_quote(kind=kind, structure=0x8017), "that the TPM made")  # A certified creation.
    for missing in (0x2, 0x10, 0x20, 0x10000, 0x40000):
        refuse(tpm_quote(kind=kind, attributes=0x50072 & ~missing), "restricted to signing")
    refuse(tpm_quote(kind=kind, attributes=0x70072), "restricted to signing")
    # What else an uncertified part of the key says must be as usual where only a CA vouches.
    assert accept(tpm_quote(kind=kind, attributes=0x50472))
    refuse(tpm_quote(kind=kind, attributes=0x50472, authority="TPM"), "no policy")


def test_policies_that_let_everything_in_are_refused():
    top = root("AMD")[0][0]
    good = {"MEASUREMENT": frozenset([b"m"])}
    with pytest.raises(InputError, match="kind of a policy"):
        Policy("sgx", good, roots=(top,))
    with pytest.raises(InputError, match="at least one root"):
        Policy("sev-snp", good)
    with pytest.raises(InputError, match="MEASUREMENT"):
        Policy("sev-snp", {}, roots=(top,))
    with pytest.raises(InputError, match="MEASUREMENT"):
        Policy("sev-snp", {"HOST_DATA": frozenset([b"h"])}, roots=(top,))
    with pytest.raises(InputError, match="allowed value"):
        Policy("sev-snp", {"MEASUREMENT": frozenset()}, roots=(top,))
    with pytest.raises(InputError, match="kind tpm lists keys"):
        Policy("sev-snp", good, roots=(top,), keys=frozenset([b"k"]))
    with pytest.raises(InputError, match="PCRs"):
        Policy("tpm", {}, keys=frozenset([b"k"]))


def test_what_a_nonce_binds():
    first = bind("release", b"challenge", b"key")
    assert len(first) == 32
    assert first == hashlib.sha256(
        b"hotloop attestation v1\0" + b"\0\0\0\7release" + b"\0\0\0\x09challenge" + b"\0\0\0\3key"
    ).digest()  # fmt: skip
    others = [bind("serve", b"challenge", b"key"), bind("release", b"challengek", b"ey"),
              bind("release", b"challenge", b"kez")]  # fmt: skip
    assert len({first, *others}) == 4


def parts_of(evidence):
    """The four sized parts of a TPM's evidence, and its chain."""
    parts, place = [], 4
    for _ in range(4):
        size = int.from_bytes(evidence[place : place + 2], "big")
        parts.append(evidence[place + 2 : place + 2 + size])
        place += 2 + size
    return parts, evidence[place:]


def test_a_tpm_key_under_the_certificate_of_another():
    made = tpm_quote(authority="TPM")
    (attest, signature, public, values), _ = parts_of(made.evidence)
    _, other_chain = parts_of(tpm_quote(kind="rsa", authority="TPM").evidence)
    forged = tpm.pack(attest, signature, public, values, [other_chain])
    refuse(Made(forged, made.policy), "must be of the TPM's attestation key")
    (other_attest, other_signature, *_), _ = parts_of(tpm_quote(kind="rsa").evidence)
    listed = tpm_quote()
    forged = tpm.pack(attest, other_signature, public, values)
    refuse(Made(forged, listed.policy), "by the scheme of its key")
    forged = tpm.pack(other_attest[:-1] + b"x", signature, public, values)
    refuse(Made(forged, listed.policy), "signature of a TPM's quote")
    forged = tpm.pack(attest, signature, public, values[:-1] + b"x")
    refuse(Made(forged, listed.policy), "those that the TPM signed")
    forged = tpm.pack(attest, signature, public, values[:-1])
    refuse(Made(forged, listed.policy), "a value for each of 3 PCRs")
    refuse(Made(b"TPM2" + listed.evidence[4:], listed.policy), "begin with TPM1")
