"""Bodies drawn near the right ones, and schemathesis on a served document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from hotloop.infer import TensorSpec
from hotloop.serve.message import Refusal
from hotloop.serve.tensors import Signature, parse_infer, parse_predict

SIGNATURE = Signature(
    (TensorSpec("x", "float32", (None, 2)), TensorSpec("n", "int64", (None, None))),
    (TensorSpec("y", "float32", (None, 2)),),
)
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance,response_headers_conformance,unsupported_method"
)
_numbers = (
    st.integers(-2, 5) | st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.none()
)
_junk = st.recursive(
    _numbers | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
_shapes = st.lists(st.integers(0, 4) | _numbers, max_size=3) | _junk
_right = st.just([1, 2]) | st.just([2, 2])
_tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "n", "z"]) | _junk,
        "datatype": st.sampled_from(["FP32", "INT64", "BYTES"]) | _junk,
        "shape": _right | _shapes,
        "data": st.lists(_numbers, max_size=5) | st.just([1, 2]) | _junk,
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": st.sampled_from([0, 8, 16, 2**63]) | _junk}
        )
        | _junk,
    },
)
_requests = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(_tensors, max_size=3) | _junk,
        "outputs": st.lists(
            st.fixed_dictionaries(
                {"name": st.sampled_from(["y", "z"])},
                optional={"parameters": st.dictionaries(st.just("binary_data"), _junk) | _junk},
            ),
            max_size=2,
        )
        | _junk,
        "parameters": st.fixed_dictionaries(
            {}, optional={"timeout": _junk, "binary_data_output": _junk}
        )
        | _junk,
        "id": _junk,
    },
)


@st.composite
def bodies(draw):
    """JSON of a request that is nearly right, and bytes behind it or ``None``."""
    document = draw(_requests | _junk)
    tail = draw(st.none() | st.binary(max_size=40) | st.just(bytes(24)))
    return json.dumps(document).encode("utf-8", "replace"), tail


def check(body, limits):
    """Parse a body: arrays that fit the model, or a refusal, and nothing else."""
    top, tail = body
    calls = [
        lambda: parse_predict(top, SIGNATURE, limits),
        lambda: parse_infer(top, None, SIGNATURE, limits),
    ]
    if tail is not None:
        calls.append(lambda: parse_infer(top + tail, len(top), SIGNATURE, limits))
    taken = 0
    for call in calls:
        try:
            parsed = call()
        except Refusal as refusal:
            if refusal.status not in (400, 413) or len(refusal.text) >= 600:
                raise AssertionError(refusal) from refusal
            continue
        taken += 1
        for spec, array in zip(SIGNATURE.inputs, parsed.arrays, strict=True):
            assert isinstance(array, np.ndarray)
            assert spec.fits(array)
            assert len(array) == parsed.rows
    return taken


def run_schemathesis(address, folder, *, max_examples, document=None, seed=1):
    """The command on the server's own document, or on another.

    A drawn deadline may pass after the request was accepted: 504 is then the right answer.
    """
    config = 'expected-statuses = ["2xx", "3xx", "4xx", 504]'
    (Path(folder) / "schemathesis.toml").write_text(f"[checks.not_a_server_error]\n{config}\n")
    program = Path(sys.executable).with_name("schemathesis")
    where = [str(document), "--url", address] if document else [f"{address}/openapi.json"]
    return subprocess.run(
        [
            program, "run", *where, "--checks", CHECKS, "--max-examples", str(max_examples),
            "--seed", str(seed), "--no-color", "--generation-database", "none",
        ],
        capture_output=True, text=True, timeout=3000, cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )  # fmt: skip
