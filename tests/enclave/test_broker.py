"""Keys go to what a policy accepts, once for each challenge, sealed; with a TPM in software."""

import contextlib
import hashlib
import io
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from hotloop.enclave.attestation import Policy, bind, protocol
from hotloop.enclave.attestation.broker import Broker, HeldKey, read_key
from hotloop.enclave.attestation.broker_server import BrokerServer
from hotloop.enclave.attestation.challenges import Challenges
from hotloop.enclave.attestation.client import fetch_key, split_url
from hotloop.enclave.attestation.sealing import ReceivingKey, release_info, seal
from hotloop.enclave.attestation.sources.tpm_tools import TpmTools, make_attestation_key
from hotloop.errors import AttestationError, InputError, RunError
from support.evidence import MAKERS, NOW_S
from support.processes import environment
from support.software_tpm import extend, software_tpm

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def tpm(tmp_path_factory):
    """A TPM that has measured one program into PCR 16, with an attestation key."""
    with (
        software_tpm(tmp_path_factory.mktemp("tpm")) as tcti,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TPM2TOOLS_TCTI", tcti)
        name = make_attestation_key()
        extend(16, "the trainer")
        yield name


def measured(*texts):
    value = bytes(32)
    for text in texts:
        value = hashlib.sha256(value + hashlib.sha256(text.encode()).digest()).digest()
    return value


def tpm_policy(name, *texts):
    return Policy("tpm", {"PCR16": frozenset([measured(*texts)])}, keys=frozenset([name]))


class Made:
    """A source that makes evidence with keys of the tests'."""

    def __init__(self, maker, kind):
        self.maker, self.kind = maker, kind
        self.asked = []

    def make(self, nonce, public_key):
        options = {"public_key": public_key} if self.kind == "nitro" else {}
        made = self.maker(nonce=nonce, **options).evidence
        self.asked.append(made)
        return made


@contextlib.contextmanager
def serving(broker, **options):
    log = io.StringIO()
    with BrokerServer(broker, "127.0.0.1", 0, log, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        server.lines = lambda: [json.loads(line) for line in log.getvalue().splitlines()]
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


def test_a_key_goes_to_the_measured_machine_alone(tpm):
    source = TpmTools(pcrs=[16])
    broker = Broker({"data": HeldKey(SECRET, (tpm_policy(tpm, "the trainer"),)),
                     "other": HeldKey(b"no", (tpm_policy(tpm, "another trainer"),))})  # fmt: skip
    with serving(broker) as server:
        assert fetch_key(server.address, "data", source) == SECRET
        with pytest.raises(AttestationError, match="PCR16 must be a measurement"):
            fetch_key(server.address, "other", source)
        with pytest.raises(AttestationError, match="a key must be one"):
            fetch_key(server.address, "none", source)
        with pytest.raises(AttestationError, match="PCR16"):
            fetch_key(server.address, "data", TpmTools(pcrs=[7]))
    lines = server.lines()
    assert [line["status"] for line in lines] == [200, 200, 200, 403, 200, 403, 200, 403]
    assert lines[1]["signer"] == tpm.hex()
    assert SECRET.decode() not in json.dumps(lines)


def test_the_key_of_another_tpm_is_refused(tpm, tmp_path, monkeypatch):
    broker = Broker({"data": HeldKey(SECRET, (tpm_policy(tpm, "the trainer"),))})
    with software_tpm(tmp_path) as tcti, serving(broker) as server:
        monkeypatch.setenv("TPM2TOOLS_TCTI", tcti)
        make_attestation_key()
        extend(16, "the trainer")
        with pytest.raises(AttestationError, match="must be one of the policy"):
            fetch_key(server.address, "data", TpmTools(pcrs=[16]))


def test_what_the_tools_say(tpm):
    with pytest.raises(RunError, match="tpm2_readpublic failed"):
        TpmTools("0x81010099").make(bytes(32), b"")
    with pytest.raises(RunError, match="tpm2_evictcontrol failed"):
        make_attestation_key()
    with pytest.raises(InputError, match="from 0 to 23"):
        TpmTools(pcrs=[24])


def test_without_tools(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match="apt-get install tpm2-tools"):
        TpmTools().make(bytes(32), b"")


@pytest.mark.parametrize("kind", list(MAKERS))
def test_every_kind_gets_its_key(kind):
    maker = MAKERS[kind]
    policy = maker().policy
    source = Made(maker, policy.kind)
    broker = Broker({"k": HeldKey(SECRET, (policy,))}, now_s=lambda: NOW_S)
    with serving(broker) as server:
        assert fetch_key(server.address, "k", source) == SECRET


def test_any_of_several_policies_is_enough():
    made, other = MAKERS["tdx-4"], MAKERS["sev-snp"]
    held = HeldKey(SECRET, (other().policy, made(authority="another maker").policy, made().policy))
    with serving(Broker({"k": held}, now_s=lambda: NOW_S)) as server:
        assert fetch_key(server.address, "k", Made(made, "tdx")) == SECRET
        with pytest.raises(AttestationError, match="of kind nitro"):
            fetch_key(server.address, "k", Made(MAKERS["nitro"], "nitro"))


def test_a_replay_is_refused():
    maker = MAKERS["sev-snp"]
    broker = Broker({"k": HeldKey(SECRET, (maker().policy,))}, now_s=lambda: NOW_S)
    receiving = ReceivingKey()
    challenge = broker.challenges.make()
    nonce = bind("release", challenge, receiving.public_key)
    evidence = maker(nonce=nonce).evidence
    asked = ("k", "sev-snp", challenge, receiving.public_key, evidence)
    released = broker.release(*asked)
    assert receiving.open(released.sealed, release_info("k", challenge)) == SECRET
    with pytest.raises(AttestationError, match="used once"):
        broker.release(*asked)
    # The same evidence under a fresh challenge, or for the thief's own key.
    fresh = broker.challenges.make()
    with pytest.raises(AttestationError, match="nonce of this challenge"):
        broker.release("k", "sev-snp", fresh, receiving.public_key, evidence)
    thief = ReceivingKey()
    challenge = broker.challenges.make()
    nonce = bind("release", challenge, receiving.public_key)
    with pytest.raises(AttestationError, match="nonce of this challenge"):
        broker.release("k", "sev-snp", challenge, thief.public_key, maker(nonce=nonce).evidence)
    # Evidence for serving does not release a key.
    challenge = broker.challenges.make()
    nonce = bind("serve", challenge, receiving.public_key)
    with pytest.raises(AttestationError, match="nonce of this challenge"):
        broker.release("k", "sev-snp", challenge, receiving.public_key, maker(nonce=nonce).evidence)
    # A document with another key in its own field.
    nitro = MAKERS["nitro"]
    broker = Broker({"k": HeldKey(SECRET, (nitro().policy,))}, now_s=lambda: NOW_S)
    challenge = broker.challenges.make()
    nonce = bind("release", challenge, receiving.public_key)
    with pytest.raises(AttestationError, match="key in the evidence"):
        broker.release("k", "nitro", challenge, receiving.public_key, nitro(nonce=nonce).evidence)


def test_challenges_end_and_are_used_once():
    now = [1000.0]
    challenges = Challenges(60, clock_s=lambda: now[0])
    first, second = challenges.make(), challenges.make()
    assert first != second
    now[0] += 59
    challenges.take(first)
    with pytest.raises(AttestationError, match="used once"):
        challenges.take(first)
    now[0] += 2
    for one in (first, second):
        with pytest.raises(AttestationError, match="within 60 s"):
            challenges.take(one)
    assert not challenges._used  # What has ended is forgotten.
    for forged in (b"", bytes(len(first)), Challenges().make(), second[:-1] + b"x", second + b"x"):
        with pytest.raises(AttestationError, match="that this broker made"):
            challenges.take(forged)


def test_hpke_as_the_rfc_has_it():
    """RFC 9180, A.2.1: what is sealed under its key and nonce opens with its private key."""
    private = "8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb"
    enc = bytes.fromhex("1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a")
    key = bytes.fromhex("ad2744de8e17f4ebba575b3f5f5a8fa1f69c2a07f6e7500bc60ca6e3e3ec1c91")
    nonce = bytes.fromhex("5c4d98150661b848853b547f")
    plain = bytes.fromhex("4265617574792069732074727574682c20747275746820626561757479")
    info = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
    # The key and nonce are those under which the RFC's own ciphertext comes out.
    assert ChaCha20Poly1305(key).encrypt(nonce, plain, b"Count-0").hex() == (
        "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"
    )
    receiving = ReceivingKey(X25519PrivateKey.from_private_bytes(bytes.fromhex(private)))
    assert receiving.public_key.hex() == (
        "4310ee97d88cc1f088a5576c77ab0cf5c3ac797f3d95139c6c84b5429c59662a"
    )
    sealed = enc + ChaCha20Poly1305(key).encrypt(nonce, plain, b"")
    assert receiving.open(sealed, info) == plain
    for damaged in (sealed[:-1], sealed[1:], b"", sealed[:40], enc + bytes(60)):
        with pytest.raises(AttestationError, match="sealed to this enclave"):
            receiving.open(damaged, info)
    with pytest.raises(AttestationError, match="sealed to this enclave"):
        receiving.open(sealed, b"for something else")
    for wrong in (b"", bytes(31), bytes(33), bytes(32)):  # Zeros: a point of small order.
        with pytest.raises(AttestationError, match="32 bytes of X25519"):
            seal(b"secret", wrong, b"")


def ask(server, path, body, *, method="POST", headers=None):
    """Status and document, over a bare socket."""
    port = int(server.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        lines = {"host": "x", "content-length": str(len(body))} | (headers or {})
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        sock.sendall(head.encode() + b"\r\n" + body)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_what_is_no_message_is_refused():
    maker = MAKERS["sev-snp"]
    broker = Broker({"k": HeldKey(SECRET, (maker().policy,))}, now_s=lambda: NOW_S)
    with serving(broker) as server:
        assert ask(server, "/v1/challenge", b"{}")[0] == 200
        for body in (b"", b"[]", b"null", b"{", b'{"a": 1}', b"[" * 9000, b"\xff\xfe", b"{}" * 2):
            status, answer = ask(server, "/v1/challenge", body)
            assert status == 403
            assert "must be JSON" in json.loads(answer)["error"]
        good = {"key": "k", "kind": "sev-snp", "challenge": bytes(40), "public_key": bytes(32),
                "evidence": b"e"}  # fmt: skip
        for change in ({"key": 1}, {"kind": None}, {"challenge": "not base64!"}, {"more": "x"},
                       {"evidence": {}}):  # fmt: skip
            status, answer = ask(server, "/v1/release", protocol.write(good | change))
            assert (status, b"must be JSON" in answer) == (403, True)
        assert ask(server, "/v1/release", protocol.write(good))[0] == 403
        assert ask(server, "/v1/none", b"{}")[0] == 404
        assert ask(server, "/v1/challenge", b"", headers={"content-length": "300000"})[0] == 413
        assert ask(server, "/v1/challenge", b"", headers={"content-length": "-1"})[0] == 411
        chunked = {"transfer-encoding": "chunked"}
        assert ask(server, "/v1/challenge", b"{}", headers=chunked)[0] == 411
        assert ask(server, "/v1/challenge", b"{}", method="GET")[0] == 501
        # It still serves.
        assert fetch_key(server.address, "k", Made(maker, "sev-snp")) == SECRET
    assert not [line for line in server.lines() if line["status"] == 500]


def own_certificate(folder):
    """Files of a certificate for 127.0.0.1 and of its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    subprocess.run(["openssl", "req", "-x509", *curve, "-nodes", "-keyout", key, "-out", cert,
                    "-days", "1", "-subj", "/CN=broker", "-addext",
                    "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)  # fmt: skip
    return cert, key


def test_over_tls(tmp_path):
    cert, key = own_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    maker = MAKERS["nitro"]
    broker = Broker({"k": HeldKey(SECRET, (maker().policy,))}, now_s=lambda: NOW_S)
    with serving(broker, tls=context) as server:
        trusted = ssl.create_default_context(cafile=str(cert))
        assert fetch_key(server.address, "k", Made(maker, "nitro"), tls=trusted) == SECRET
        with pytest.raises(RunError, match="must answer"):  # Not one of the system's.
            fetch_key(server.address, "k", Made(maker, "nitro"))
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as plain:
            plain.sendall(b"POST /v1/challenge HTTP/1.1\r\n\r\n" * 10)
            plain.settimeout(10)
            with contextlib.suppress(OSError):
                while plain.recv(4096):
                    pass
        assert fetch_key(server.address, "k", Made(maker, "nitro"), tls=trusted) == SECRET


# Python's ``wrap_socket`` loses a socket that is reset meanwhile: the collector closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_clients_that_break_off_do_not_use_it_up(tmp_path, tls):
    """Many more than it has places: reset at once, halfway, or without a word."""
    maker = MAKERS["sev-snp"]
    broker = Broker({"k": HeldKey(SECRET, (maker().policy,))}, now_s=lambda: NOW_S)
    cert, context, trusted = None, None, None
    if tls:
        cert, key = own_certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        trusted = ssl.create_default_context(cafile=str(cert))
    words = (b"", b"\x16\x03\x01", b"POST /v1/release HTTP/1.1\r\nContent-Length: 50\r\n\r\nhalf")
    with serving(broker, tls=context) as server:
        for number in range(120):
            sock = socket.create_connection(("127.0.0.1", server.server_address[1]))
            with contextlib.suppress(OSError), sock:
                if number % 4 != 3:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.sendall(words[number % 3])
        for _ in range(3):
            assert fetch_until_there(server, maker, trusted) == SECRET


def fetch_until_there(server, maker, trusted):
    """The last of those before may still hold their places for a moment."""
    for _ in range(100):
        with contextlib.suppress(RunError):
            return fetch_key(server.address, "k", Made(maker, "sev-snp"), tls=trusted)
        time.sleep(0.05)
    raise AssertionError("it does not serve any more")


def test_urls():
    assert split_url("http://a:1") == ("http", "a", 1)
    assert split_url("https://a/") == ("https", "a", 443)
    for wrong in ("a:1", "ftp://a", "http://", "http://a/path", "http://a:99999", "http://[::1"):
        with pytest.raises(InputError, match="a URL must be"):
            split_url(wrong)
    with pytest.raises(RunError, match="must answer"):
        fetch_key("http://127.0.0.1:1", "k", Made(None, "tpm"))


def write_broker(folder, name):
    (folder / "data.key").write_bytes(SECRET)
    (folder / "data.key").chmod(0o600)
    path = folder / "broker.toml"
    path.write_text(f"""
challenge_life_s = 30

[policies.trainer]
kind = "tpm"
keys = ["{name.hex()}"]
measurements.PCR16 = ["{measured("the trainer").hex()}"]

[keys.data]
file = "data.key"
policies = ["trainer"]
""")
    return path


def test_a_brokers_file(tmp_path):
    path = write_broker(tmp_path, b"\0\x0b" + bytes(32))
    assert Broker.load(path).keys["data"].secret == SECRET
    assert "0123" not in repr(Broker.load(path).keys)
    text = path.read_text()
    for old, new, match in (
        ('kind = "tpm"', 'kind = "sgx"', "kind of a policy"),
        ("keys = [", "names = [", "a policy has the keys"),
        ('"trainer"]', '"trainers"]', "must name policies"),
        ("data.key", "none.key", "must be readable"),
        ("challenge_life_s = 30", "challenge_life_s = 0", "from 1 to 3600"),
        ("challenge_life_s", "challenge_life", "has only"),
        ("measurements.PCR16 = ", "measurements.PCR16 = 5 #", "list of texts"),
        ("measurements.PCR16", "min_tcb.firmware = -1\nmeasurements.PCR16", "whole number"),
        ("measurements.PCR16", "allow_debug = 1\nmeasurements.PCR16", "true or false"),
        ("[keys.data]", "[keys.'../data']", "a name must be"),
        ("file =", "path =", "has only"),
        ("keys = [\"", "keys = [\"x", "hexadecimal"),
        ("[policies", "[policies", None), ("kind", "= kind", "must be TOML"),
    ):  # fmt: skip
        path.write_text(text.replace(old, new, 1))
        if match is None:
            Broker.load(path)
        else:
            with pytest.raises(InputError, match=match):
                Broker.load(path)
    path.write_text(text)
    (tmp_path / "data.key").chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        Broker.load(path)
    (tmp_path / "data.key").chmod(0o600)
    (tmp_path / "data.key").write_bytes(b"")
    with pytest.raises(InputError, match="1 to 4096 bytes"):
        read_key(tmp_path / "data.key")


def hotloop(*words, **more):
    return [sys.executable, "-m", "hotloop", "enclave", "keys", *map(str, words)]


def test_the_commands(tpm, tmp_path):
    """Owner and enclave as two processes, over HTTP on loopback, with the TPM between."""
    env = environment(tmp_path, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    path = write_broker(tmp_path, tpm)
    broker = subprocess.Popen(hotloop("serve", path, "--port", 0, "--json"), env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        told = json.loads(broker.stdout.readline())
        assert told["keys"] == ["data"]
        out = tmp_path / "fetched"
        options = ("--kind", "tpm", "--pcrs", "16", "--out", out)
        done = subprocess.run(hotloop("fetch", told["address"], "data", *options), env=env,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert out.read_bytes() == SECRET
        assert out.stat().st_mode & 0o777 == 0o600
        done = subprocess.run(hotloop("fetch", told["address"], "more", "--json", *options[:-1],
                                      tmp_path / "x"),
                              env=env, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 2
        assert "a key must be one" in json.loads(done.stdout)["error"]
        assert not (tmp_path / "x").exists()
    finally:
        broker.terminate()
        _, log = broker.communicate(timeout=20)
    assert [json.loads(line)["status"] for line in log.splitlines()] == [200, 200, 200, 403]
    done = subprocess.run(hotloop("describe", "--kind", "tpm", "--pcrs", "16"), env=env,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert f'PCR16 = ["{measured("the trainer").hex()}"]' in done.stdout
    assert tpm.hex() in done.stdout
