"""What hostile or broken clients send: the right refusal, bounded memory, and still serving."""

import contextlib
import gzip
import json
import time

import numpy as np
import pytest

from hotloop.monitor import resident_bytes
from hotloop.serve import Limits
from support import serving
from support.serving import Doubler, Running, request_bytes, tensor

LIMITS = Limits(
    max_body_bytes=100_000, max_json_bytes=50_000, max_chunks=1000, max_rows=500,
    header_timeout_s=0.4, body_timeout_s=0.6, idle_timeout_s=1.0, max_connections=400,
)  # fmt: skip
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def served():
    with Running(Doubler(), limits=LIMITS) as running:
        yield running


@pytest.fixture(autouse=True)
def serves_afterwards(served):
    yield
    served.still_serves()
    served.until(lambda: served.server.model.lane.batcher.num_queued == 0)
    assert '"request failed"' not in served.log_text.getvalue()


def infer_status(served, document):
    status, answer = served.infer(document)
    assert set(answer) == {"error"} or status == 200
    return status


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", b"POST /predict HTTP/1.1\r\nHost: loc", HEAD,
     HEAD + b"Content-Length: 9\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"],
    ids=["nothing", "method", "header", "headers", "body", "chunk"],
)  # fmt: skip
def test_slow_clients_are_let_go(served, sent):
    with served.connect() as client:
        client.send(sent)
        if sent:
            status, headers, _ = client.answer()
            assert (status, headers[b"connection"]) == (408, b"close")
        assert client.is_closed()


def test_a_drip_of_bytes_does_not_extend_the_time(served):
    with served.connect() as client:
        client.send(HEAD + b"X: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 500:
                client.send(b"x")
                sent += 1
                time.sleep(0.02)
        assert sent < 500


def test_an_idle_connection_is_closed_after_its_time(served):
    with served.connect() as client:
        client.send(request_bytes("GET", "/v2/health/live"))
        assert client.answer()[0] == 200
        assert client.is_closed()


def test_many_idle_connections_leave_room(served):
    clients = [served.connect() for _ in range(600)]
    try:
        served.still_serves()
        hub_size = served.ask("GET", "/metrics")[2].decode()
        open_now = next(
            line for line in hub_size.splitlines() if line.startswith("hotloop_serve_connections ")
        )
        assert float(open_now.split()[1]) <= LIMITS.max_connections + 16
    finally:
        for client in clients:
            client.socket.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 431),
        (HEAD + b"X: " + b"a" * 20_000, 431),
        (HEAD + b"".join(b"x%d: 1\r\n" % n for n in range(100)) + b"\r\n", 431),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Content-Length: 100001\r\n\r\n", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (HEAD + b"Transfer-Encoding: identity\r\n\r\n", 501),
        (HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET ftp://localhost/v2 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http:///v2 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://me:secret@localhost/v2 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (HEAD + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n", 400),
        (HEAD + b"Content-Length: 2\r\nContent-Encoding: gzip\r\n\r\n{}", 415),
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
         b"Inference-Header-Content-Length: 3\r\n\r\n{}", 400),
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
         b"Inference-Header-Content-Length: -1\r\n\r\n{}", 400),
        (HEAD + b"X-Request-Timeout-Ms: soon\r\nContent-Length: 26\r\n\r\n"
         b'{"inputs": [[1, 2, 3, 4]]}', 400),
    ],
)  # fmt: skip
def test_broken_requests_are_refused(served, sent, status):
    with served.connect() as client:
        client.send(sent)
        found, _, body = client.answer()
        assert found == status, body
        assert "error" in json.loads(body)


def test_a_million_one_byte_chunks_are_cut_off(served):
    with served.connect() as client:
        before = resident_bytes()
        try:
            client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(100):
                client.send(b"1\r\n0\r\n" * 10_000)
        except ConnectionError:
            pass
        with contextlib.suppress(ConnectionError):  # It may be closed while we still write.
            assert client.answer()[0] == 413
        assert resident_bytes() - before < 30e6


def test_a_body_without_end_is_cut_off(served):
    with served.connect() as client:
        client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(100):
                client.send(b"2710\r\n" + b"0" * 10_000 + b"\r\n")
            assert client.answer()[0] == 413
        except ConnectionError:
            pass


def test_all_bodies_together_are_bounded():
    limits = Limits(max_buffered_bytes=50_000, max_body_bytes=40_000)
    with Running(Doubler(), limits=limits) as served:
        clients = [served.connect() for _ in range(10)]
        for client in clients:
            client.send(HEAD + b"Content-Length: 20000\r\n\r\n" + b" " * 15_000)
        served.until(lambda: served.ask("GET", "/v2")[0] == 200)
        for client in clients:
            client.send(b" " * 5_000)
        statuses = [client.answer()[0] for client in clients]
        assert set(statuses) == {400, 503}
        for client in clients:
            client.socket.close()
        served.still_serves()


def test_a_gzip_bomb_is_not_opened(served):
    bomb = gzip.compress(b"0" * 20_000_000)
    body = bomb[:60_000]
    for path in ("/predict", "/v2/models/m/infer"):
        status, headers, _ = served.ask("POST", path, body, [("Content-Encoding", "gzip")])
        assert (status, headers[b"accept-encoding"]) == (415, b"identity")


@pytest.mark.parametrize(
    "shape",
    [[2**62, 4], [2**31, 2**31], [2**63, 2**63], [-1, 4], [1, -4], [0, 4], [1, 4, 1], [], [4],
     [1.0, 4], ["1", 4], [True, 4], [None, 4], "14", None, {"0": 1}, [1] * 1000, [[1], 4],
     [501, 4]],
    ids=str,
)  # fmt: skip
def test_shapes_that_cannot_be(served, shape):
    assert infer_status(served, tensor([1, 2, 3, 4], shape=shape)) in (400, 413)
    entry = {
        "name": "x",
        "datatype": "FP32",
        "shape": shape,
        "parameters": {"binary_data_size": 16},
    }
    top = json.dumps({"inputs": [entry]}).encode()
    headers = [("Inference-Header-Content-Length", len(top))]
    assert served.ask("POST", "/v2/models/m/infer", top + bytes(16), headers)[0] in (400, 413)


@pytest.mark.parametrize(
    "data",
    [None, 1, "1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, None], [1, 2, 3, "4"], [1, 2, 3, True],
     [1, 2, 3, {}], [1, 2, 3, [4]], [[1, 2], [3, 4]], [[[1, 2, 3, 4]]], [[1, 2, 3], 4], [[]], [],
     [1, 2, 3, 1e300], [1, 2, 3, 10**400]],
    ids=lambda data: str(data)[:20],
)  # fmt: skip
def test_data_that_does_not_fit(served, data):
    assert infer_status(served, tensor(data, shape=[1, 4])) == 400


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e999", "nan", "0x1", "01", "'1'"]
)
def test_numbers_that_json_does_not_have(served, text):
    body = b'{"inputs": [[1, 2, 3, %b]]}' % text.encode()
    assert served.ask("POST", "/predict", body)[0] == 400


@pytest.mark.parametrize("depth", [33, 1000, 20_000])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_deep_json(served, depth, bracket):
    close = "]" if bracket == "[" else "}"
    for body in (bracket * depth, bracket * depth + "1" + close * depth):
        body = body.encode()[:49_000]
        assert served.ask("POST", "/predict", body)[0] in (400, 413)


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b"{}", b'{"inputs": {}}',
     b'{"inputs": {"z": [1]}}', b'{"inputs": [[1,2,3,4]], "more": 1}', b"\x00" * 100,
     b'{"inputs": [[1,2,3,4]], "id": 5}', b'{"inputs": [[1,2,3,4]], "parameters": []}',
     b'{"inputs": [[1,2,3,4]], "parameters": {"timeout": -1}}',
     b'{"inputs": [[1,2,3,4]], "parameters": {"sequence_id": 1}}', b'{"inputs": [[1,2],[3,4]]}',
     b'{"inputs": [[1,2,3,4],[1,2,3]]}', b'{"inputs": "[[1,2,3,4]]"}', b'{"inputs": [[1,2,3,4]]}x'],
)  # fmt: skip
def test_bodies_of_predict_that_are_wrong(served, body):
    assert served.ask("POST", "/predict", body)[0] == 400


def test_too_many_values_are_counted_before_they_are_made(served):
    body = b'{"inputs": [' + b"1," * 24_000 + b"1]}"
    assert served.ask("POST", "/predict", body)[0] == 413


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []}, {"inputs": {}}, {"inputs": None}, {"inputs": [1]}, {"inputs": [{}]},
        {"outputs": {}}, {"outputs": [{"name": "z"}]}, {"outputs": [{"name": "y"}, {"name": "y"}]},
        {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
        {"outputs": [{"name": "y", "parameters": {"classification": 3}}]},
        {"parameters": {"binary_data_output": "yes"}}, {"parameters": {"timeout": 1.5}},
        {"parameters": {"timeout": True}}, {"id": "x" * 300}, {"id": 1},
    ],
)  # fmt: skip
def test_infer_requests_that_are_wrong(served, change):
    assert infer_status(served, {**tensor([[1, 2, 3, 4]]), **change}) == 400


@pytest.mark.parametrize(
    "change",
    [{"name": "z"}, {"name": 1}, {"name": None}, {"datatype": "FP64"}, {"datatype": None},
     {"datatype": "BYTES"}, {"parameters": {"shared_memory_region": "r"}}, {"parameters": 1},
     {"parameters": {"binary_data_size": 16}}],
)  # fmt: skip
def test_tensors_that_are_wrong(served, change):
    document = tensor([[1, 2, 3, 4]])
    document["inputs"][0].update(change)
    assert infer_status(served, document) == 400


@pytest.mark.parametrize("size", [0, 15, 17, 32, -1, 2**70, 16.0, "16", True, None])
def test_binary_sizes_that_are_wrong(served, size):
    body, _ = serving.binary(np.ones((1, 4), np.float32))
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4],
                            "parameters": {"binary_data_size": size}}]}  # fmt: skip
    top = json.dumps(document).encode()
    headers = [("Inference-Header-Content-Length", len(top))]
    assert served.ask("POST", "/v2/models/m/infer", top + body[-16:], headers)[0] == 400


@pytest.mark.parametrize("extra", [b"", b"x", b"x" * 16])
def test_bytes_that_are_missing_or_left_over(served, extra):
    x = np.ones((2, 4), np.float32)
    body, headers = serving.binary(x)
    cut = body[:-1] if not extra else body + extra
    assert served.ask("POST", "/v2/models/m/infer", cut, headers)[0] == 400


def test_more_rows_than_allowed(served):
    body, headers = serving.binary(np.ones((501, 4), np.float32))
    assert served.ask("POST", "/v2/models/m/infer", body, headers)[0] == 413


def test_booleans_are_nought_or_one():
    with Running(Doubler(dtype="bool", fixed=(None, 4))) as served:
        good, headers = serving.binary(np.ones((1, 4), bool))
        # The engine cannot double booleans: what matters is that the parser lets only these in.
        assert served.ask("POST", "/v2/models/m/infer", good[:-1] + b"\x02", headers)[0] == 400


def test_a_failure_of_the_model_says_nothing_of_the_server(served):
    status, answer = served.infer(tensor([[-1, 2, 3, 4]]))
    assert (status, answer) == (500, {"error": "the model failed on this input"})
    served.until(lambda: "secret" in served.log_text.getvalue())


def test_pipelining_beyond_the_limit_is_answered_up_to_it(served):
    with served.connect() as client:
        client.send(request_bytes("POST", "/predict", b'{"inputs": [[1, 2, 3, 4]]}') * 200)
        answers = []
        with contextlib.suppress(EOFError, ConnectionError):
            while len(answers) < 200:
                answers.append(client.answer()[0])
        assert set(answers) == {200}
        assert len(answers) < 200


def test_a_client_that_does_not_read_is_let_go():
    limits = Limits(write_timeout_s=0.5, max_pipelined=1000)
    with Running(Doubler(width=50_000), limits=limits) as served:
        body, headers = serving.binary(
            np.ones((4, 50_000), np.float32), parameters={"binary_data_output": True}
        )
        sent = request_bytes("POST", "/v2/models/m/infer", body, headers)
        with served.connect(15.0) as client, pytest.raises((ConnectionError, TimeoutError)):
            client.send(sent * 200)
        served.until(lambda: served.ask("GET", "/v2")[0] == 200)
