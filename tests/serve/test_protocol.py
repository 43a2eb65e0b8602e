"""The protocol as its clients speak it: paths, JSON and binary tensors, the real client."""

import json
import subprocess
import sys

import numpy as np
import pytest

from support import serving
from support.serving import Doubler, Running, tensor


@pytest.fixture(scope="module")
def served():
    with Running(Doubler()) as running:
        yield running


def get(served, path):
    status, _, body = served.ask("GET", path)
    return status, json.loads(body)


def test_health_and_metadata(served):
    assert get(served, "/v2/health/live") == (200, {"live": True})
    assert get(served, "/v2/health/ready") == (200, {"ready": True})
    status, server = get(served, "/v2")
    assert (status, server["name"]) == (200, "hotloop")
    assert "binary_tensor_data" in server["extensions"]
    for path in ("/v2/models/m", "/v2/models/m/versions/1", "/v2/models/m/"):
        status, model = get(served, path)
        assert status == 200
        assert model["versions"] == ["1"]
        assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert get(served, "/v2/models/m/versions/1/ready")[0] == 200
    for path in ("/v2/models/other", "/v2/models/m/versions/2", "/v2/models/m/versions/1/x", "/x"):
        assert get(served, path)[0] == 404


def test_json_tensors_flat_and_nested(served):
    rows = [[1, 2, 3, 4], [5, 6, 7, 8.5]]
    flat = [value for row in rows for value in row]
    for data in (rows, flat):
        status, answer = served.infer(tensor(data, shape=[2, 4], id="a1"))
        assert status == 200
        assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a1", "m", "1")
        (out,) = answer["outputs"]
        assert (out["name"], out["datatype"], out["shape"]) == ("y", "FP32", [2, 4])
        assert out["data"] == [2 * value for value in flat]


@pytest.mark.parametrize("asked", ["all", "output", "json"])
def test_binary_tensors(served, asked):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    more = {
        "all": {"parameters": {"binary_data_output": True}},
        "output": {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]},
        "json": {"outputs": [{"name": "y"}]},
    }[asked]
    body, headers = serving.binary(x, **more)
    status, got, answer = served.ask("POST", "/v2/models/m/versions/1/infer", body, headers)
    assert status == 200
    if asked == "json":
        assert json.loads(answer)["outputs"][0]["data"] == (2 * x).ravel().tolist()
        return
    length = int(got[b"inference-header-content-length"])
    assert json.loads(answer[:length])["outputs"][0]["parameters"]["binary_data_size"] == 48
    assert np.array_equal(np.frombuffer(answer[length:], np.float32).reshape(3, 4), 2 * x)


def test_the_same_question_again_gets_its_own_numbers(served):
    for n in range(3):
        for rows in (1, 2):
            x = np.full((rows, 4), n + rows, np.float32)
            body, headers = serving.binary(x, parameters={"binary_data_output": True})
            _, got, answer = served.ask("POST", "/v2/models/m/infer", body, headers)
            length = int(got[b"inference-header-content-length"])
            assert json.loads(answer[:length])["outputs"][0]["shape"] == [rows, 4]
            assert np.array_equal(np.frombuffer(answer[length:], np.float32), 2 * x.ravel())


def test_not_numbers_are_kept_in_binary_and_null_in_json(served):
    x = np.array([[np.nan, np.inf, -np.inf, 1]], dtype=np.float32)
    body, headers = serving.binary(x)
    _, _, answer = served.ask("POST", "/v2/models/m/infer", body, headers)
    assert json.loads(answer)["outputs"][0]["data"] == [None, None, None, 2]
    body, headers = serving.binary(x, parameters={"binary_data_output": True})
    _, _, answer = served.ask("POST", "/v2/models/m/infer", body, headers)
    assert np.array_equal(np.frombuffer(answer[-16:], np.float32), 2 * x[0], equal_nan=True)


def test_predict_takes_nested_lists(served):
    for inputs in ([[1, 2, 9, 4]], {"x": [[1, 2, 9, 4]]}, [1, 2, 9, 4]):
        status, _, body = served.ask("POST", "/predict", json.dumps({"inputs": inputs}).encode())
        answer = json.loads(body)
        assert status == 200, answer
        assert answer["outputs"] == {"y": [[2, 4, 18, 8]]}
        assert answer["classes"] == [2]


def test_one_connection_takes_many_requests_in_order(served):
    with served.connect() as client:
        sent = [serving.request_bytes("POST", "/v2/models/m/infer",
                                      json.dumps(tensor([[n, 0, 0, 0]])).encode())
                for n in range(10)]  # fmt: skip
        client.send(b"".join(sent))
        for n in range(10):
            status, _, body = client.answer()
            assert (status, json.loads(body)["outputs"][0]["data"][0]) == (200, 2 * n)
        client.send(serving.request_bytes("HEAD", "/v2"))
        status, headers, _ = client.answer(head=True)
        assert (status, int(headers[b"content-length"]) > 0) == (200, True)
        client.send(serving.request_bytes("GET", "/v2", headers=[("Connection", "close")]))
        assert client.answer()[0] == 200
        assert client.is_closed()


def test_a_request_may_come_in_any_pieces(served):
    whole = serving.request_bytes("POST", "/predict", b'{"inputs": [[1, 2, 3, 4]]}')
    with served.connect() as client:
        for at in range(len(whole)):
            client.send(whole[at : at + 1])
        assert client.answer()[0] == 200
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"inputs": [[1, 2, 3, 4]]}')
        client.send(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                    + chunks + b"0\r\n\r\n")  # fmt: skip
        assert client.answer()[0] == 200


def test_expect_continue_is_answered(served):
    body = b'{"inputs": [[1, 2, 3, 4]]}'
    whole = serving.request_bytes("POST", "/predict", body, [("Expect", "100-continue")])
    with served.connect() as client:
        client.send(whole[: -len(body)])
        assert client.answer()[0] == 100
        client.send(body)
        assert client.answer()[0] == 200
    refused = serving.request_bytes("POST", "/no", body, [("Expect", "100-continue")])
    with served.connect() as client:
        client.send(refused[: -len(body)])
        assert client.answer()[0] == 404
        assert client.is_closed()


def test_a_method_that_is_not_served_names_the_ones_that_are(served):
    status, headers, _ = served.ask("GET", "/predict")
    assert (status, headers[b"allow"]) == (405, b"post")
    status, headers, _ = served.ask("DELETE", "/v2")
    assert (status, headers[b"allow"]) == (405, b"get, head")


def test_metrics_and_stats(served):
    served.still_serves()
    status, headers, body = served.ask("GET", "/metrics")
    text = body.decode()
    assert status == 200
    assert headers[b"content-type"].startswith(b"text/plain; version=0.0.4")
    assert 'hotloop_serve_requests_total{route="infer",code="200"}' in text
    assert 'hotloop_serve_latency_seconds_bucket{le="+Inf"}' in text
    for line in text.splitlines():
        assert line.startswith("# ") or float(line.rpartition(" ")[2]) >= 0
    status, stats = get(served, "/stats")
    assert status == 200
    assert sum(stats["recent_batch_rows"]) <= stats["rows"]
    assert stats["latency_p99_s"] >= stats["latency_p50_s"] > 0


def test_a_model_without_a_batch_takes_its_own_shape():
    with Running(Doubler(fixed=(2, 2))) as served:
        status, answer = served.infer(tensor([[1, 2], [3, 4]]))
        assert (status, answer["outputs"][0]["data"]) == (200, [2, 4, 6, 8])
        assert served.infer(tensor([[1, 2]]))[0] == 400


def test_the_documents_are_there(served):
    status, document = get(served, "/openapi.json")
    assert (status, document["openapi"]) == (200, "3.1.0")
    for path in ("/v2/models/m/infer", "/predict"):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert served.ask("POST", path, json.dumps(content["example"]).encode())[0] == 200
    status, headers, body = served.ask("GET", "/docs")
    assert status == 200
    assert b"/v2/models/m/infer" in body
    assert b"default-src 'none'" in headers[b"content-security-policy"]


TRITON = """
import sys, numpy as np, tritonclient.http as http
client = http.InferenceServerClient(sys.argv[1], concurrency=4)
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m")
assert client.get_server_metadata()["name"] == "hotloop"
assert client.get_model_metadata("m", "1")["inputs"][0]["datatype"] == "FP32"
x = np.arange(8, dtype=np.float32).reshape(2, 4)
for binary_in in (True, False):
    for outputs in (None, [http.InferRequestedOutput("y", binary_data=True)],
                    [http.InferRequestedOutput("y", binary_data=False)]):
        given = http.InferInput("x", x.shape, "FP32")
        given.set_data_from_numpy(x, binary_data=binary_in)
        got = client.infer("m", [given], outputs=outputs, request_id="7", timeout=5_000_000)
        assert np.array_equal(got.as_numpy("y"), 2 * x), got.as_numpy("y")
        assert got.get_response()["id"] == "7"
given = http.InferInput("x", x.shape, "FP32")
given.set_data_from_numpy(x)
waiting = [client.async_infer("m", [given]) for _ in range(32)]
assert all(np.array_equal(w.get_result().as_numpy("y"), 2 * x) for w in waiting)
given = http.InferInput("x", [1, 3], "FP32")
given.set_data_from_numpy(x[:1, :3])
try:
    client.infer("m", [given])
except Exception as error:
    assert "shape of input x must be" in str(error), error
else:
    raise AssertionError("a wrong shape was taken")
print("done")
"""


def test_the_triton_client_speaks_to_it_unchanged(served):
    # In a process of its own: the client works on gevent.
    pytest.importorskip("tritonclient")
    ran = subprocess.run(
        [sys.executable, "-c", TRITON, f"localhost:{served.port}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.stdout.strip() == "done", ran.stderr
