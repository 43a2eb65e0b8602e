"""What clients, proxies and probes send that is not wrong: each gets its answer."""

import json

import pytest

from hotloop.serve.app import AppOptions
from support.serving import Doubler, Running, request_bytes, tensor

INFER = json.dumps(tensor([[1, 2, 3, 4]])).encode()
LIVE = "/v2/health/live"


@pytest.fixture(scope="module")
def served():
    with Running(Doubler(), app=AppOptions(allowed_hosts=frozenset({b"localhost"}))) as running:
        yield running


def old(method, path, *headers, body=b""):
    """A request of HTTP/1.0."""
    lines = [f"{method} {path} HTTP/1.0", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def doubled(answer):
    status, _, body = answer
    assert status == 200, body
    return json.loads(body)["outputs"][0]["data"] == [2, 4, 6, 8]


@pytest.mark.parametrize("path", [LIVE, "/v2/health/ready", "/v2/models/m/ready"])
def test_a_probe_of_http_1_0_names_no_host_and_is_let_go(served, path):
    with served.connect() as client:
        client.send(old("GET", path))
        status, headers, _ = client.answer()
        assert (status, headers[b"connection"]) == (200, b"close")
        assert client.is_closed()


def test_a_host_that_is_given_is_checked_in_any_version(served):
    for request in (
        old("GET", LIVE, "Host: evil.example"),
        b"GET /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        with served.connect() as client:
            client.send(request)
            assert client.answer()[0] == 421
    with served.connect() as client:
        client.send(old("GET", "/v2", "Origin: http://evil.example"))
        assert client.answer()[0] == 403


@pytest.mark.parametrize("asked", ["keep-alive", "Keep-Alive"])
def test_http_1_0_keeps_a_connection_that_asks_for_it_and_is_told(served, asked):
    with served.connect() as client:
        for _ in range(2):
            client.send(old("POST", "/v2/models/m/infer", f"Connection: {asked}", body=INFER))
            answer = client.answer()
            assert answer[1][b"connection"] == b"keep-alive"
            assert doubled(answer)
        client.send(old("GET", LIVE))
        assert client.answer()[1][b"connection"] == b"close"
        assert client.is_closed()


def test_http_1_0_is_never_asked_to_continue(served):
    with served.connect() as client:
        client.send(old("POST", "/v2/models/m/infer", "Expect: 100-continue", body=INFER))
        assert doubled(client.answer())


@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("http://localhost/v2/health/live", "localhost"),
        ("HTTP://LocalHost:80/v2/health/live?probe=1", "localhost"),
        ("http://localhost/v2/health/live", "evil.example"),
        ("https://localhost/v2/health/live/", "localhost"),
    ],
)
def test_a_target_may_be_a_whole_address(served, target, host):
    with served.connect() as client:
        client.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.answer()[0] == 200


def test_an_address_without_a_path_is_the_root(served):
    with served.connect() as client:
        client.send(b"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.answer()[0] == served.ask("GET", "/")[0]
        client.send(b"GET http://localhost?a=/b HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.answer()[0] == served.ask("GET", "/")[0]


UPGRADE = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AA")]


@pytest.mark.parametrize("whole", [True, False])
def test_an_offered_upgrade_is_not_taken_and_the_request_answered(served, whole):
    """Java's HttpClient offers HTTP/2 with its first request."""
    sent = [
        request_bytes("POST", "/v2/models/m/infer", INFER, UPGRADE),
        request_bytes("GET", LIVE, b"", UPGRADE),
        request_bytes("POST", "/v2/models/m/infer", INFER),
    ]
    with served.connect() as client:
        if whole:
            client.send(b"".join(sent))
        for request in sent:
            if not whole:
                client.send(request)
            answer = client.answer()
            assert answer[0] == 200
            assert b"live" in answer[2] or doubled(answer)


def test_who_asks_before_a_body_behind_another_request_is_answered_too(served):
    first = request_bytes("POST", "/v2/models/m/infer", INFER)
    second = request_bytes("POST", "/v2/models/m/infer", INFER, [("Expect", "100-continue")])
    with served.connect(timeout_s=5) as client:
        client.send(first + second[: -len(INFER)])
        assert doubled(client.answer())
        assert client.answer()[0] == 100
        client.send(INFER)
        assert doubled(client.answer())


@pytest.mark.parametrize(
    "more",
    [
        {"outputs": []}, {"outputs": None}, {"id": None, "parameters": None, "outputs": None},
        {"parameters": {}}, {"parameters": {"timeout": 0, "sequence_id": 0, "priority": 0}},
    ],
)  # fmt: skip
def test_fields_that_are_empty_are_as_if_left_out(served, more):
    document = tensor([[1, 2, 3, 4]], **more)
    document["inputs"][0]["parameters"] = None
    status, answer = served.infer(document)
    assert status == 200, answer
    assert answer["outputs"][0]["data"] == [2, 4, 6, 8]


def test_a_byte_order_mark_is_skipped(served):
    assert doubled(served.ask("POST", "/v2/models/m/infer", b"\xef\xbb\xbf" + INFER))
