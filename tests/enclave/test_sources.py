"""Devices that give evidence, played by the tests: what is sent to them, what is made of it."""

import ctypes
import os
import uuid

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")

from hotloop.enclave.attestation import cbor, verify
from hotloop.enclave.attestation.certificates import split_der
from hotloop.enclave.attestation.sources import open_source
from hotloop.enclave.attestation.sources.nsm import NitroModule
from hotloop.enclave.attestation.sources.tsm import TsmReport, certificates_of
from hotloop.errors import AttestationError, InputError, RunError
from support.evidence import NONCE, NOW_S, nitro, sev_snp, tdx


def nsm(answer):
    """An ``ioctl`` that reads the request through the pointers, as the kernel does, and answers."""
    seen = []

    def ioctl(file, number, raw):
        assert number == 0xC0200A00
        assert os.fstat(file)
        seen.append(cbor.decode(ctypes.string_at(raw.request.address, raw.request.length), "it"))
        data = cbor.encode(answer) if not isinstance(answer, bytes) else answer
        assert len(data) <= raw.response.length == 0x3000
        ctypes.memmove(raw.response.address, data, len(data))
        raw.response.length = len(data)
        return 0

    return ioctl, seen


def test_the_nitro_module(tmp_path):
    device = tmp_path / "nsm"
    device.touch()
    document = nitro(public_key=b"public").evidence
    ioctl, seen = nsm({"Attestation": {"document": document}})
    assert NitroModule(device, ioctl).make(NONCE, b"public") == document
    body = {"user_data": None, "nonce": NONCE, "public_key": b"public"}
    assert seen == [{"Attestation": body}]
    for answer in ({"Error": "InvalidArgument"}, "InputTooLarge", {"Attestation": {}}, []):
        with pytest.raises(RunError, match="answer with a document"):
            NitroModule(device, nsm(answer)[0]).make(NONCE, b"public")
    with pytest.raises(AttestationError, match="CBOR"):
        NitroModule(device, nsm(b"\xff")[0]).make(NONCE, b"public")

    def fails(file, number, raw):
        raise OSError(22, "Invalid argument")

    with pytest.raises(RunError, match="must answer; got Invalid argument"):
        NitroModule(device, fails).make(NONCE, b"public")
    with pytest.raises(InputError, match="no Nitro enclave"):
        NitroModule(tmp_path / "none").make(NONCE, b"public")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Folders that behave as configfs does: attributes are there at once and go with the folder."""
    state = {}

    def start(provider, make_report, table=None, jumps=1):
        state.update(provider=provider, table=table, jumps=jumps, make=make_report)
        return tmp_path

    real_mkdir, real_rmdir, real_write = (
        type(tmp_path).mkdir, type(tmp_path).rmdir, type(tmp_path).write_bytes)  # fmt: skip

    def mkdir(self, *args, **options):
        real_mkdir(self, *args, **options)
        (self / "provider").write_text(state["provider"] + "\n")
        (self / "generation").write_text("4\n")

    def rmdir(self):
        for one in self.iterdir():
            one.unlink()
        real_rmdir(self)

    def write_bytes(self, data):
        real_write(self, data)
        if self.name == "inblob":
            state["nonce"] = data
            real_write(self.parent / "outblob", state["make"](data))
            if state["table"] is not None:
                real_write(self.parent / "auxblob", state["table"])
            (self.parent / "generation").write_text(f"{4 + state['jumps']}\n")

    monkeypatch.setattr(type(tmp_path), "mkdir", mkdir)
    monkeypatch.setattr(type(tmp_path), "rmdir", rmdir)
    monkeypatch.setattr(type(tmp_path), "write_bytes", write_bytes)
    return start, state


def table_of(certificates):
    """AMD's table of (name, certificate), each at a place of its own."""
    offset = 24 * (len(certificates) + 1)
    head, body = b"", b""
    for name, data in certificates:
        head += uuid.UUID(name).bytes + (offset + len(body)).to_bytes(4, "little")
        head += len(data).to_bytes(4, "little")
        body += data
    return head + bytes(24) + body


VCEK, ASK, ARK = ("63da758d-e664-4564-adc5-f4b93be8accd", "4ab7b379-bbac-4fe4-a02f-05aef327c782",
                  "c0b406a4-a803-4952-9743-3fb6014cd0ae")  # fmt: skip


def test_sev_snp_by_configfs(kernel):
    start, state = kernel
    made = sev_snp()
    leaf, middle = split_der(made.evidence[1184:], "it")
    table = table_of([(ARK, b"unused"), (VCEK, leaf), (ASK, middle)])
    root = start("sev_guest", lambda nonce: sev_snp(nonce=nonce).evidence[:1184], table)
    evidence = TsmReport("sev-snp", root=root).make(NONCE, b"")
    assert state["nonce"] == NONCE.ljust(64, b"\0")
    assert verify(evidence, policy=made.policy, nonce=NONCE, now_s=NOW_S).kind == "sev-snp"
    assert list(root.iterdir()) == []
    state["table"] = None
    with pytest.raises(InputError, match="--certificates"):
        TsmReport("sev-snp", root=root).make(NONCE, b"")
    for name, data in (("leaf", leaf), ("middle", middle)):
        with open(root / name, "wb") as file:
            file.write(data)
    source = TsmReport("sev-snp", [root / "leaf", root / "middle"], root=root)
    evidence = source.make(NONCE, b"")
    assert verify(evidence, policy=made.policy, nonce=NONCE, now_s=NOW_S).kind == "sev-snp"


def test_tdx_by_configfs(kernel):
    start, state = kernel
    root = start("tdx_guest", lambda nonce: tdx(nonce=nonce[:32]).evidence + bytes(3000))
    evidence = TsmReport("tdx", root=root).make(NONCE, b"")
    policy = tdx().policy
    assert verify(evidence, policy=policy, nonce=NONCE, now_s=NOW_S).kind == "tdx"
    state["jumps"] = 2
    with pytest.raises(RunError, match="two at once"):
        TsmReport("tdx", root=root).make(NONCE, b"")
    state["provider"] = "sev_guest"
    with pytest.raises(InputError, match="guest of tdx"):
        TsmReport("tdx", root=root).make(NONCE, b"")
    with pytest.raises(InputError, match=r"Linux 6\.7"):
        TsmReport("tdx", root=root / "none").make(NONCE, b"")


def test_tables_of_certificates():
    assert certificates_of(b"") == []
    assert certificates_of(table_of([(VCEK, b"leaf")])) == []
    good = table_of([(VCEK, b"leaf"), (ASK, b"middle")])
    assert certificates_of(good + bytes(4096)) == [b"leaf", b"middle"]
    for damaged in (good[:20], good[:-1], bytes([1]) * 24):
        with pytest.raises(RunError, match="the host's certificates"):
            certificates_of(damaged)


def test_sources_by_kind():
    for kind in ("tpm", "nitro", "sev-snp", "tdx"):
        assert open_source(kind).kind == kind
    with pytest.raises(InputError, match="evidence must be one of"):
        open_source("sgx")
