"""One sealed file: Tink's bytes, any place of it, and nothing that was changed."""

import base64
import io
import itertools
import json
import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.errors import SealedError
from hotloop.sealed import stream
from support.sealing import SECRET, WHAT, damaged, opened, sealed

pytest.importorskip("cryptography", reason="pip install 'hotloop[enclave]'")

SMALL = 256  # Bytes of a segment, so that short files have several.
FIRST = SMALL - stream.HEADER_BYTES - stream.TAG_BYTES


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(stream, "SEGMENT_BYTES", SMALL)


def read(path, **known):
    with opened(path, **known) as file:
        return file.read()


def refused(path, **known):
    with pytest.raises(SealedError) as caught:
        read(path, **known)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "size", [0, 1, FIRST - 1, FIRST, FIRST + 1, FIRST + 240, FIRST + 241, 5000]
)
def test_it_comes_back_at_each_edge_of_a_segment(small_segments, tmp_path, size):
    data = os.urandom(size)
    path = tmp_path / "f"
    path.write_bytes(sealed(data))
    assert read(path) == data
    assert path.stat().st_size == stream.sealed_bytes(size)


@given(
    data=st.binary(max_size=3000),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    reads=st.lists(st.tuples(st.integers(0, 3200), st.integers(0, 900)), max_size=12),
)
def test_any_pieces_in_any_places_out(tmp_path_factory, data, cuts, reads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "SEGMENT_BYTES", SMALL)
        out = bytearray()
        writer = stream.SealedWriter(out.extend, SECRET, WHAT)
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, end in itertools.pairwise(edges):
            writer.write(data[start:end])
        writer.finish()
        path = tmp_path_factory.mktemp("sealed") / "f"
        path.write_bytes(out)
        with opened(path) as file:
            for at, count in reads:
                file.seek(at)
                assert file.read(count) == data[at : at + count]


def test_a_nonce_never_comes_twice(small_segments, monkeypatch):
    used = []
    plain_cipher = stream._cipher

    class Noting:
        def __init__(self, *arguments):
            self.salt, self.cipher = arguments[1], plain_cipher(*arguments)

        def encrypt_into(self, nonce, *rest):
            used.append((self.salt, nonce))
            return self.cipher.encrypt_into(nonce, *rest)

    monkeypatch.setattr(stream, "_cipher", Noting)
    for _ in range(20):
        sealed(bytes(3000))
    assert len(used) == len(set(used)) > 20 * 10
    assert len({salt for salt, _ in used}) == 20


def test_every_flipped_byte_and_every_length_is_seen(small_segments, tmp_path):
    data = sealed(b"0123456789" * 25)
    path = tmp_path / "f"
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        refused(path)
        path.write_bytes(data[:at])
        refused(path)


def test_segments_cannot_be_cut_swapped_or_joined(small_segments, tmp_path):
    data, other = (sealed(bytes(FIRST + 3 * 240)) for _ in range(2))
    parts = [data[at : at + SMALL] for at in range(0, len(data), SMALL)]
    others = [other[at : at + SMALL] for at in range(0, len(other), SMALL)]
    assert len(parts) == 4
    path = tmp_path / "f"
    for changed in (
        parts[:3],
        parts[:1],
        [parts[0], *parts[2:]],
        [parts[0], parts[2], parts[1], parts[3]],
        [*parts[:3], others[3]],
        [others[0], *parts[1:]],
        [*parts, parts[3]],
        [*parts, *others],
    ):
        path.write_bytes(b"".join(changed))
        refused(path)
    path.write_bytes(b"".join(parts))
    assert read(path) == bytes(FIRST + 3 * 240)


def test_another_key_another_name_and_other_files(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(sealed(b"text"))
    refused(path, secret=bytes(32))
    refused(path, what=b"another file")
    for data in (b"", b"x", bytes(56), b"(" * 56, os.urandom(4096)):
        path.write_bytes(data)
        refused(path)


def test_a_file_that_changes_under_the_reader(small_segments, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(sealed(bytes(200_000)))
    with opened(path) as file:
        assert file.read(10) == bytes(10)
        os.truncate(path, 1000)
        with pytest.raises(SealedError, match="shorter"):
            file.read()


def damage(path, count, seed):
    draw = random.Random(seed)
    data, other = sealed(bytes(1500)), sealed(bytes(1500))
    accepted = 0
    for _ in range(count):
        changed = damaged(data, other, draw)
        path.write_bytes(changed)
        if changed == data:
            accepted += 1
            continue
        refused(path)
    return accepted


def test_damaged_files_are_refused(small_segments, tmp_path):
    assert damage(tmp_path / "f", 400, 1) < 40


@pytest.mark.full
def test_25_000_damaged_files_are_refused(small_segments, tmp_path):
    assert damage(tmp_path / "f", 26_000, 2) < 1_000


@pytest.mark.parametrize("size", [0, 1, 2**20 - 57, 2**20 - 56, 2**20 - 55, 2**21 + 5])
def test_tink_reads_it_and_it_reads_tinks(tmp_path, size):
    tink = pytest.importorskip("tink", reason="pip install tink==1.16.1")
    primitive = _tinks(tink)
    data = os.urandom(size)
    with primitive.new_decrypting_stream(io.BytesIO(sealed(data)), WHAT) as plain:
        assert plain.read() == data
    path = tmp_path / "f"
    with path.open("wb") as file, primitive.new_encrypting_stream(file, WHAT) as plain:
        plain.write(data)
    assert read(path) == data


def _tinks(tink):
    from tink import json_proto_keyset_format, secret_key_access, streaming_aead
    from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2

    streaming_aead.register()
    parameters = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingParams(
        ciphertext_segment_size=2**20, derived_key_size=32, hkdf_hash_type=common_pb2.SHA256
    )
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(
        version=0, key_value=SECRET, params=parameters
    )
    name = "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey"
    value = base64.b64encode(key.SerializeToString()).decode()
    entry = {
        "keyData": {"typeUrl": name, "value": value, "keyMaterialType": "SYMMETRIC"},
        "status": "ENABLED", "keyId": 1, "outputPrefixType": "RAW",
    }  # fmt: skip
    text = json.dumps({"primaryKeyId": 1, "key": [entry]})
    handle = json_proto_keyset_format.parse(text, secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)
