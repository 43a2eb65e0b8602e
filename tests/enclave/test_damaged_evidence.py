"""Evidence with a byte changed, cut, moved or added: never accepted, never a traceback."""

import random

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")

from hotloop.enclave.attestation import cbor, verify
from hotloop.errors import AttestationError
from support.evidence import MAKERS, NONCE, NOW_S

KINDS = list(MAKERS)
_FULL = 25_000


def refused(made, evidence) -> None:
    """Anything but ``AttestationError`` fails: acceptance, and every other exception."""
    with pytest.raises(AttestationError) as caught:
        verify(evidence, policy=made.policy, nonce=NONCE, now_s=NOW_S)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600


def damaged(evidence: bytes, draw: random.Random) -> bytes:
    """One of the ways in which a document is damaged or forged without the key."""
    place, end = draw.randrange(len(evidence)), draw.randrange(len(evidence) + 1)
    way = draw.randrange(8)
    if way < 3:
        changed = evidence[place] ^ draw.randrange(1, 256)
        return evidence[:place] + bytes([changed]) + evidence[place + 1 :]
    if way == 3:
        return evidence[:place]
    if way == 4:
        return evidence[:place] + draw.randbytes(draw.randrange(1, 9)) + evidence[place:]
    if way == 5:
        return evidence[:place] + evidence[place + draw.randrange(1, 9) :]
    if way == 6:  # A part of it over another part.
        part = evidence[place : place + 64]
        return (evidence[:end] + part + evidence[end + len(part) :])[: len(evidence)]
    return evidence + draw.randbytes(draw.randrange(1, 9))


def sweep(kind: str, count: int) -> None:
    draw = random.Random(f"{kind} {count}")
    made = MAKERS[kind]()
    done = 0
    while done < count:
        evidence = damaged(made.evidence, draw)
        if evidence != made.evidence:
            refused(made, evidence)
            done += 1


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_evidence_is_refused(kind):
    sweep(kind, 60)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_flipped(kind):
    """Each byte with its lowest bit, its highest and all of them turned."""
    made = MAKERS[kind]()
    evidence = bytearray(made.evidence)
    for place in range(len(evidence)):
        for mask in (0x01, 0x80, 0xFF):
            evidence[place] ^= mask
            refused(made, bytes(evidence))
            evidence[place] ^= mask


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_25_000_damaged_documents(kind):
    sweep(kind, -(-_FULL // len(KINDS)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_evidence_at_all(kind):
    made = MAKERS[kind]()
    draw = random.Random(kind)
    shapes = [b"", b"\0", bytes(5000), b"\xff" * 5000, b"0\x82\xff\xff", b"TPM1" + b"\xff" * 100]
    shapes += [draw.randbytes(4000), b"\x84" * 5000, b"\x9f" * 5000, b"\xbf" * 5000]
    for evidence in shapes:
        refused(made, evidence)
    for other in KINDS:
        if MAKERS[other]().policy.kind != made.policy.kind:
            refused(made, MAKERS[other]().evidence)


# Of RFC 8949, appendix A, those that attestation documents are made of.
_RFC = [
    (0, "00"), (23, "17"), (24, "1818"), (100, "1864"), (1000, "1903e8"), (1000000, "1a000f4240"),
    (1000000000000, "1b000000e8d4a51000"), (18446744073709551615, "1bffffffffffffffff"),
    (-1, "20"), (-10, "29"), (-100, "3863"), (-1000, "3903e7"), (False, "f4"), (True, "f5"),
    (None, "f6"), (b"", "40"), (b"\1\2\3\4", "4401020304"), ("", "60"), ("IETF", "6449455446"),
    ("\u00fc", "62c3bc"), ("\u6c34", "63e6b0b4"), ([], "80"), ([1, 2, 3], "83010203"),
    ([1, [2, 3], [4, 5]], "8301820203820405"), ({}, "a0"), ({1: 2, 3: 4}, "a201020304"),
    ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), _RFC, ids=[text for _, text in _RFC])
def test_cbor_as_the_rfc_has_it(value, text):
    assert cbor.encode(value) == bytes.fromhex(text)
    decoded = cbor.decode(bytes.fromhex(text), "it")
    assert decoded == value
    assert type(decoded) is type(value)


def test_cbor_without_lengths():
    for text, value in (("9fff", []), ("9f018202039f0405ffff", [1, [2, 3], [4, 5]]),
                        ("bf61610161629f0203ffff", {"a": 1, "b": [2, 3]})):  # fmt: skip
        assert cbor.decode(bytes.fromhex(text), "it") == value


@pytest.mark.parametrize("text", [
    "", "18", "1817", "190017", "1a00000017", "fb3ff0000000000000", "f7", "f0", "ff",
    "c11a514b67b0",
    "5f42010243030405ff", "7f657374726561646d696e67ff", "0000", "a10102ff", "a201020103",
    "82ff01", "bf01ff",
    "a1ff01", "a1f401", "a1820102f4", "1c", "61ff", "81" * 10 + "00", "9a00010000",
    "5b7fffffffffffffff00", "9bffffffffffffffff", "9f" + "00" * 300 + "ff",
])  # fmt: skip
def test_other_cbor_is_refused(text):
    with pytest.raises(AttestationError, match="CBOR at byte"):
        cbor.decode(bytes.fromhex(text), "it")
