"""The parsers on drawn inputs, and the whole server on its OpenAPI document.

The counts here keep the run short; ``benchmarks/fuzz_server.py`` runs them for longer.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.infer import TensorSpec
from hotloop.serve import Limits
from hotloop.serve.json_body import depth_exceeds
from hotloop.serve.message import Refusal
from hotloop.serve.tensors import Signature, parse_infer, parse_predict
from support import examples, fuzzing, serving
from support.serving import Doubler, Running, request_bytes

LIMITS = Limits(max_body_bytes=1_000_000, max_json_bytes=100_000)


@given(fuzzing.bodies())
@settings(max_examples=examples(1500))
def test_no_body_breaks_the_parsers(body):
    fuzzing.check(body, LIMITS)


@given(st.binary(max_size=400), st.integers(-1, 500))
@settings(max_examples=examples(500))
def test_no_bytes_break_the_parsers(raw, length):
    for call in (
        lambda: parse_predict(raw, fuzzing.SIGNATURE, LIMITS),
        lambda: parse_infer(raw, None if length < 0 else length, fuzzing.SIGNATURE, LIMITS),
    ):
        with pytest.raises(Refusal):
            call()


@given(
    rows=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float64", "int8", "int64", "uint64", "bool", "float16"]),
    form=st.sampled_from(["flat", "nested", "binary", "predict"]),
)  # fmt: skip
@settings(max_examples=examples(300))
def test_what_was_sent_is_what_arrives(rows, width, seed, dtype, form):
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        x = rng.integers(info.min, info.max, (rows, width), dtype=kind, endpoint=True)
    elif kind.kind == "b":
        x = rng.integers(0, 2, (rows, width)).astype(bool)
    else:
        x = rng.normal(size=(rows, width)).astype(kind)
    spec = (TensorSpec("x", dtype, (None, width)),)
    signature = Signature(spec, spec)
    if form == "predict":
        parsed = parse_predict(json.dumps({"inputs": x.tolist()}).encode(), signature, LIMITS)
    else:
        entry = {"name": "x", "datatype": signature.input_types[0], "shape": [rows, width]}
        if form == "binary":
            entry["parameters"] = {"binary_data_size": x.nbytes}
        else:
            entry["data"] = (x if form == "nested" else x.ravel()).tolist()
        top = json.dumps({"inputs": [entry]}).encode()
        tail = x.tobytes() if form == "binary" else b""
        parsed = parse_infer(top + tail, len(top) if tail else None, signature, LIMITS)
    (array,) = parsed.arrays
    assert (array.dtype, parsed.rows) == (kind, rows)
    assert np.array_equal(array, x)


@given(fuzzing.bodies(), st.binary(max_size=40))
@settings(max_examples=examples(500))
def test_json_seen_before_is_judged_as_if_it_were_new(body, other):
    top, tail = body
    fresh = Signature(fuzzing.SIGNATURE.inputs, fuzzing.SIGNATURE.outputs)
    for last in (tail or b"", other, tail or b""):
        results = []
        for signature in (fresh, Signature(fresh.inputs, fresh.outputs)):
            try:
                parsed = parse_infer(top + last, len(top), signature, LIMITS)
            except Refusal as refusal:
                results.append(refusal.status)
            else:
                results.append(
                    (
                        [(a.tobytes(), a.shape, str(a.dtype)) for a in parsed.arrays],
                        (parsed.rows, parsed.id, parsed.timeout_s, parsed.outputs, parsed.binary),
                    )
                )
        assert results[0] == results[1]


@given(st.recursive(st.none() | st.integers() | st.text("ab", max_size=3),
                    lambda inner: st.lists(inner, max_size=4)
                    | st.dictionaries(st.text("ab", max_size=2), inner, max_size=4)),
       st.integers(1, 6))  # fmt: skip
@settings(max_examples=examples(300))
def test_depth_is_counted_exactly(value, most):
    def depth(value):
        if isinstance(value, dict):
            value = list(value.values())
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert depth_exceeds(json.dumps(value).encode(), most) == (depth(value) > most)


@pytest.fixture(scope="module")
def served():
    with Running(Doubler(), limits=Limits(header_timeout_s=2, body_timeout_s=2)) as running:
        yield running


def test_mangled_requests_are_answered_or_closed(served):
    rng = np.random.default_rng(7)
    body, headers = serving.binary(np.ones((2, 4), np.float32))
    good = request_bytes("POST", "/v2/models/m/infer", body, headers)
    for _ in range(examples(300)):
        raw = bytearray(good)
        for _ in range(int(rng.integers(1, 6))):
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
        with served.connect() as client:
            client.send(bytes(raw))
            client.socket.shutdown(1)
            try:
                status, _, _ = client.answer()
            except (EOFError, ConnectionError):
                continue
            assert status in (100, 200, 400, 403, 404, 405, 408, 413, 415, 421, 431, 505), bytes(
                raw
            )
    served.still_serves()
    assert "request failed" not in served.log_text.getvalue()


def test_the_openapi_document_holds(served, tmp_path):
    pytest.importorskip("schemathesis")
    found = fuzzing.run_schemathesis(served.address, tmp_path, max_examples=examples(15))
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    served.still_serves()
    assert "request failed" not in served.log_text.getvalue()
    statuses = {code for _, code in served.server.stats.requests}
    assert {200, 400, 405} <= statuses
    assert not {500, 502, 503} & statuses


@pytest.mark.full
def test_fuzzing_finds_what_it_looks_for(served, tmp_path):
    # A document that promises what is not there must fail.
    document = json.loads(served.ask("GET", "/openapi.json")[2])
    document["components"]["schemas"]["ServerMetadata"]["required"].append("absent")
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(document))
    found = fuzzing.run_schemathesis(served.address, tmp_path, max_examples=2, document=path)
    assert found.returncode == 1, found.stdout[-3000:]
