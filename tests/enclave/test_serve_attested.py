"""A server that proves itself on its TLS connection, and what stands between being found out."""

import dataclasses
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading

import pytest

pytest.importorskip("cryptography", reason="attestation needs cryptography")
pytest.importorskip("httptools", reason="serving needs httptools")

from hotloop.enclave.attestation import protocol
from hotloop.enclave.attestation.client import AttestedConnection
from hotloop.errors import AttestationError, RunError
from hotloop.serve import AppOptions, Tokens, tls_context
from hotloop.serve.attesting import Attester
from support.evidence import MAKERS, NOW_S
from support.processes import environment
from support.serving import Doubler, Running, request_bytes
from support.software_tpm import extend, software_tpm

TOKEN = "0123456789abcdef0123"


def make_certificate(folder):
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    files = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    subprocess.run(["openssl", "req", "-x509", *curve, "-nodes", *files, "-days", "1",
                    "-subj", "/CN=server"], check=True, capture_output=True)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


class Source:
    """Makes evidence by keys of the tests'; waits for ``go``."""

    def __init__(self, kind):
        self.maker = MAKERS[kind]
        self.kind = self.maker().policy.kind
        self.go = threading.Event()
        self.go.set()
        self.fails = False

    def make(self, nonce, public_key):
        assert self.go.wait(20)
        if self.fails:
            raise RunError("the device failed")
        return self.maker(nonce=nonce).evidence


class Log:
    def __init__(self):
        self.lines = []

    def error(self, *words, **fields):
        self.lines.append((words, fields))


def attested(kind, certificate, **app):
    source, log = Source(kind), Log()
    attester = Attester(source, certificate / "cert.pem", log)
    tls = tls_context(certificate / "cert.pem", certificate / "key.pem")
    running = Running(Doubler(), tls=tls, app=AppOptions(attest=attester.answer, **app))
    running.source, running.failures = source, log.lines
    return running


def connect(port, policy):
    return AttestedConnection("127.0.0.1", port, policy, now_s=lambda: NOW_S)


@pytest.mark.parametrize("kind", list(MAKERS))
def test_a_client_sends_only_to_what_it_verified(kind, certificate):
    policy = MAKERS[kind]().policy
    with attested(kind, certificate) as served:
        connection = connect(served.port, policy)
        connection.request("POST", "/predict", json.dumps({"inputs": [[1, 2, 3, 4]]}))
        assert json.load(connection.getresponse())["outputs"]["y"] == [[2, 4, 6, 8]]
        assert connection.claims.kind == policy.kind
        connection.close()
        wrong = {name: frozenset([b"x" * 48]) for name in policy.measurements}
        connection = connect(served.port, dataclasses.replace(policy, measurements=wrong))
        with pytest.raises(AttestationError, match="must be a measurement"):
            connection.request("POST", "/predict", "secret")
        assert connection.sock is None
        assert connection.claims is None
    assert served.server.stats.requests[("predict", 200)] == 1
    assert ("predict", 400) not in served.server.stats.requests


def test_another_kind_is_refused(certificate):
    with attested("tdx-4", certificate) as served:
        connection = connect(served.port, MAKERS["nitro"]().policy)
        with pytest.raises(AttestationError, match="attest by nitro"):
            connection.connect()


def test_one_who_stands_between_is_found_out(certificate, tmp_path):
    """It ends TLS with a certificate of its own and passes everything on, evidence too."""
    own = make_certificate(tmp_path)
    context = tls_context(own / "cert.pem", own / "key.pem")
    policy = MAKERS["sev-snp"]().policy
    with attested("sev-snp", certificate) as served, socket.create_server(("127.0.0.1", 0)) as ear:

        def relay():
            client, _ = ear.accept()
            inside = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            inside.check_hostname, inside.verify_mode = False, ssl.CERT_NONE
            upstream = socket.create_connection(("127.0.0.1", served.port))
            with (
                context.wrap_socket(client, server_side=True) as left,
                inside.wrap_socket(upstream) as right,
            ):
                for _ in ("head", "body"):
                    right.sendall(left.recv(65536))
                left.sendall(right.recv(65536))
                left.recv(1)

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        with pytest.raises(AttestationError, match="nonce of this challenge"):
            connect(ear.getsockname()[1], policy).connect()
        thread.join(10)
        connection = connect(served.port, policy)
        connection.connect()
        connection.close()


def test_what_is_asked_and_refused(certificate, tmp_path):
    (tmp_path / "tokens").write_text(TOKEN)
    tokens = Tokens(tmp_path / "tokens")
    with attested("sev-snp", certificate, tokens=tokens) as served:
        connection = connect(served.port, MAKERS["sev-snp"]().policy)
        connection.connect()  # Without a token: it is sent only then.
        connection.request("GET", "/openapi.json", headers={"authorization": f"Bearer {TOKEN}"})
        assert "/attestation" in json.load(connection.getresponse())["paths"]

        def ask(body, method="POST"):
            connection.request(method, "/attestation", body)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

        for body in (b"", b"{}", b"[]", protocol.write({"challenge": b"short"}),
                     protocol.write({"challenge": bytes(65)}), b'{"challenge": 5}'):  # fmt: skip
            assert ask(body)[0] == 400
        assert ask(None, "GET")[0] == 405
        served.source.fails = True
        status, answer = ask(protocol.write({"challenge": bytes(32)}))
        assert (status, answer) == (500, {"error": "the server cannot make evidence"})
        assert "the device failed" in served.failures[0][1]["error"]
        connection.close()
        with pytest.raises(AttestationError, match="cannot make evidence"):
            connection.connect()


def test_those_who_ask_too_much_do_not_stop_it(certificate):
    source = Source("sev-snp")
    source.go.clear()
    attester = Attester(source, certificate / "cert.pem", Log())
    body = protocol.write({"challenge": bytes(32)})
    with Running(Doubler(), app=AppOptions(attest=attester.answer)) as served:
        clients = [served.connect() for _ in range(17)]
        for client in clients:
            client.send(request_bytes("POST", "/attestation", body))
        ready, _, _ = select.select([client.socket for client in clients], [], [], 20)
        refused = [client for client in clients if client.socket in ready]
        assert [client.answer()[0] for client in refused] == [503]
        served.still_serves()
        source.go.set()
        for client in clients:
            with client:
                assert client in refused or client.answer()[0] == 200
        assert served.ask("POST", "/attestation", body)[0] == 200


def test_without_attestation_there_is_no_such_path(certificate):
    tls = tls_context(certificate / "cert.pem", certificate / "key.pem")
    with Running(Doubler(), tls=tls) as served:
        connection = connect(served.port, MAKERS["sev-snp"]().policy)
        with pytest.raises(AttestationError, match="nothing at this path"):
            connection.connect()
    with pytest.raises(RunError, match="must answer"):
        connection.connect()


def test_the_commands(certificate, tmp_path):
    """``hotloop serve --attest tpm`` and ``hotloop enclave keys verify``, a TPM in software."""
    onnx = pytest.importorskip("onnx", reason="the served model is an ONNX file")
    pytest.importorskip("onnxruntime", reason="the served model runs in ONNX Runtime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, kind, ["rows", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "relu.onnx")
    command = [sys.executable, "-m", "hotloop"]
    (tmp_path / "tpm").mkdir()
    with software_tpm(tmp_path / "tpm") as tcti, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPM2TOOLS_TCTI", tcti)
        env = environment(tmp_path, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
        extend(16, "the server")
        keys = [*command, "enclave", "keys"]
        subprocess.run([*keys, "make-tpm-key"], env=env, check=True, capture_output=True)
        policy = subprocess.run([*keys, "describe", "--kind", "tpm", "--pcrs", "16"], env=env,
                                check=True, capture_output=True, text=True).stdout  # fmt: skip
        (tmp_path / "policy.toml").write_text(policy.replace("NAME", "server"))
        server = subprocess.Popen(
            [*command, "serve", tmp_path / "relu.onnx", "--port", "0", "--json", "--attest", "tpm",
             "--pcrs", "16", "--tls-cert", certificate / "cert.pem",
             "--tls-key", certificate / "key.pem"],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        try:
            address = json.loads(server.stdout.readline())["address"]
            verify = [*keys, "verify", address, "--policy", tmp_path / "policy.toml", "--json"]
            done = subprocess.run(verify, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
            assert json.loads(done.stdout)["kind"] == "tpm"
            extend(16, "something else")
            done = subprocess.run(verify, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert "PCR16 must be a measurement" in json.loads(done.stdout)["error"]
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=30)
