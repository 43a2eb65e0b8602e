"""Who is served: tokens, TLS, hosts and origins, and what may be exposed."""

import json
import ssl
import subprocess
import urllib.request

import pytest

from hotloop.errors import InputError
from hotloop.serve import AppOptions, Tokens, check_exposure, is_loopback, tls_context
from support.serving import Doubler, Running, request_bytes

TOKEN = "0123456789abcdef0123"
OTHER = "another-token-of-some-length"


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"{TOKEN}\n{OTHER}\n")
    return path


def test_without_a_token_only_health_and_the_page_are_there(token_file):
    with Running(Doubler(), app=AppOptions(tokens=Tokens(token_file))) as served:
        for path in ("/v2/health/live", "/v2/health/ready", "/", "/page.js", "/page.css"):
            assert served.ask("GET", path)[0] == 200
        for path in ("/v2", "/v2/models/m", "/metrics", "/stats", "/openapi.json", "/docs", "/no"):
            status, headers, body = served.ask("GET", path)
            assert (status, headers[b"www-authenticate"]) == (401, b"bearer")
        for wrong in ("", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xe9"):
            status, _, _ = served.ask("GET", "/v2", headers=[("Authorization", wrong)])
            assert status == 401
        for good in (f"Bearer {TOKEN}", f"bearer {OTHER}"):
            assert served.ask("GET", "/v2", headers=[("Authorization", good)])[0] == 200
        body = b'{"inputs": [[1, 2, 3, 4]]}'
        assert served.ask("POST", "/predict", body)[0] == 401
        assert (
            served.ask("POST", "/predict", body, [("Authorization", f"Bearer {TOKEN}")])[0] == 200
        )


@pytest.mark.parametrize(
    "text", ["", "\n\n", "short\n", f"{TOKEN}\nshort", "with spaces in the line"]
)
def test_token_files_that_cannot_be_used(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(InputError, match="one token a line") as caught:
        Tokens(path)
    assert "short" not in str(caught.value).replace("short and", "")
    with pytest.raises(InputError, match="readable"):
        Tokens(tmp_path / "none")


def test_tokens_can_be_changed(token_file):
    tokens = Tokens(token_file)
    token_file.write_text(OTHER)
    assert tokens.allows(f"Bearer {TOKEN}".encode())
    tokens.reload()
    assert not tokens.allows(f"Bearer {TOKEN}".encode())
    assert tokens.allows(f"Bearer {OTHER}".encode())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.invalid", False),
     ("", False)],
)  # fmt: skip
def test_only_loopback_is_open_without_more(host, loopback):
    assert is_loopback(host) is loopback
    if loopback:
        check_exposure(host, tls=False, tokens=False, insecure=False)
        return
    with pytest.raises(InputError, match="--token-file"):
        check_exposure(host, tls=False, tokens=False, insecure=False)
    for more in ("tls", "tokens", "insecure"):
        check_exposure(host, **{"tls": False, "tokens": False, "insecure": False, more: True})


def test_names_and_pages_of_others_are_refused():
    app = AppOptions(allowed_hosts=frozenset({b"localhost", b"127.0.0.1", b"[::1]"}))
    with Running(Doubler(), app=app) as served:
        for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200),
                             ("LOCALHOST", 200), ("evil.example", 421), ("", 421),
                             ("localhost.evil.example", 421)):  # fmt: skip
            with served.connect() as client:
                client.send(f"GET /v2 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert client.answer()[0] == status, host
        for origin, status in (("http://localhost", 200), ("https://evil.example", 403),
                               ("null", 403), ("http://localhost:1", 403)):  # fmt: skip
            assert served.ask("GET", "/v2", headers=[("Origin", origin)])[0] == status


def test_loading_again_needs_a_token_and_takes_no_parameters(token_file):
    path = "/v2/repository/models/m/load"
    with Running(Doubler()) as served:
        assert served.ask("POST", path, b"{}")[0] == 403
    with Running(lambda: Doubler(), app=AppOptions(tokens=Tokens(token_file))) as served:
        allowed = [("Authorization", f"Bearer {TOKEN}")]
        assert served.ask("POST", path, b"{}")[0] == 401
        body = json.dumps({"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}).encode()
        assert served.ask("POST", path, body, allowed)[0] == 400
        status, _, body = served.ask("POST", path, b"{}", allowed)
        assert (status, json.loads(body)) == (200, {"versions": ["2"]})


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem",
         "-out", folder / "cert.pem"],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl cannot make a certificate here")
    return folder


def test_tls_serves_and_old_versions_are_refused(certificate):
    context = tls_context(certificate / "cert.pem", certificate / "key.pem")
    with Running(Doubler(), tls=context) as served:
        assert served.address.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
        with urllib.request.urlopen(f"https://localhost:{served.port}/v2", context=trusted) as got:
            assert json.load(got)["name"] == "hotloop"
        # Plain text to the TLS port is closed, and the server goes on.
        with served.connect() as client:
            client.send(request_bytes("GET", "/v2"))
            with pytest.raises((EOFError, ConnectionError)):
                client.answer()
        with urllib.request.urlopen(f"https://localhost:{served.port}/v2", context=trusted) as got:
            assert got.status == 200
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_certificates_that_cannot_be_used(tmp_path):
    (tmp_path / "cert.pem").write_text("none")
    for cert in ("cert.pem", "missing.pem"):
        with pytest.raises(InputError, match="PEM"):
            tls_context(tmp_path / cert, tmp_path / "cert.pem")
