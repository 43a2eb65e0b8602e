"""Fuzzing of the server's tensor parser by atheris: bodies mutated under the guidance of coverage.

    python benchmarks/fuzz_parser.py [--runs 10000000] [--seconds 120]

atheris (libFuzzer for Python) mutates bodies of good requests to the v2 protocol and to /predict
and gives each to the parser. Any exception but a refusal with a 4xx status is a crash, and so is an
accepted request whose arrays do not fit the model: libFuzzer then ends with code 77 and writes the
body to its corpus. Ends with code 0 and the count of what ran and what was accepted.

`pip install 'hotloop[fuzz]'` brings it. `fuzz_server.py` draws bodies with hypothesis instead, and
requests from the OpenAPI document with schemathesis.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy

# What libFuzzer may put in, beside bytes it has seen.
_TOKENS = (
    *(f'"{word}"' for word in (
        "inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "x", "k", "b",
        "binary_data_size", "binary_data", "binary_data_output", "timeout", "classification",
        "FP32", "INT64", "BOOL", "BYTES",
    )),
    "[2, 2, 3]", "[2]", "[2, 1]", "[-1, 2, 3]", "[4294967296, 4294967296]", "1e999", "-0", "1e39",
    "9223372036854775808", "18446744073709551616", "true", "false", "null", "NaN", "{}", "[]",
    "[[", "]]", ", ", ": ", "\\ud800", "0.5", "48",
)  # fmt: skip


def _good_bodies(specs: list) -> list[bytes]:
    """One good body for each way of writing a request, behind the two bytes that choose the way."""
    from hotloop.bench.requests import encode
    from hotloop.serve.datatypes import protocol_name

    arrays = [
        (
            {"name": spec.name, "datatype": protocol_name(spec.dtype)},
            numpy.ones([2 if size is None else size for size in spec.shape], spec.dtype),
        )
        for spec in specs
    ]
    bodies = []
    for way, fmt in enumerate(("json", "binary", "predict")):
        content, headers = encode(fmt, arrays)
        length = int(headers.get("Inference-Header-Content-Length", 0))
        bodies.append(bytes([way]) + length.to_bytes(2, "big") + content)
    return bodies


def _target(specs: list):
    """A function of bytes that raises on anything but acceptance and a refusal."""
    from hotloop.serve.limits import Limits
    from hotloop.serve.message import Refusal
    from hotloop.serve.tensors import Signature, parse_infer, parse_predict

    signature, limits = (
        Signature(tuple(specs), tuple(specs)),
        Limits(max_body_bytes=1 << 20, max_rows=64),
    )
    counts = {"runs": 0, "accepted": 0}

    def one(data: bytes) -> None:
        counts["runs"] += 1
        if len(data) < 3:
            return
        way, length, body = data[0] % 3, int.from_bytes(data[1:3], "big"), data[3:]
        try:
            if way == 2:
                asked = parse_predict(body, signature, limits)
            else:
                asked = parse_infer(body, length if way == 1 else None, signature, limits)
        except Refusal as refusal:
            if not 400 <= refusal.status < 500:
                raise AssertionError(f"refused with {refusal.status}") from refusal
            return
        counts["accepted"] += 1
        if len(asked.arrays) != len(specs) or not 1 <= asked.rows <= limits.max_rows:
            raise AssertionError(f"accepted {asked.rows} rows, {len(asked.arrays)} arrays")
        for spec, array in zip(specs, asked.arrays, strict=True):
            if not spec.fits(str(array.dtype), array.shape) or len(array) != asked.rows:
                raise AssertionError(f"accepted {array.dtype} {array.shape} for {spec.text()}")
            if array.nbytes != math.prod(array.shape) * array.itemsize:
                raise AssertionError("an array has another size than its shape")
            if way != 1 and array.dtype.kind == "f" and not numpy.isfinite(array).all():
                raise AssertionError("accepted a number out of range")

    return one, counts


def fuzz(runs: int, seconds: int, seed: int, corpus: str | None) -> int:
    """Runs in this process and never returns: libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["hotloop.serve", "hotloop.infer.engine"]):
        import hotloop.serve.tensors  # noqa: F401
        from hotloop.infer.engine import TensorSpec
    specs = [TensorSpec("x", "float32", (None, 2, 3)), TensorSpec("k", "int64", (None,)),
             TensorSpec("b", "bool", (None, 1))]  # fmt: skip
    one, counts = _target(specs)
    folder = corpus or tempfile.mkdtemp(prefix="hotloop-fuzz-")
    for number, body in enumerate(_good_bodies(specs)):
        one(body)
        Path(folder, f"good-{number}").write_bytes(body)
    if counts["accepted"] != 3:
        raise RuntimeError("the good bodies must be accepted")
    words = Path(tempfile.mkdtemp(prefix="hotloop-fuzz-"), "words")
    escaped = (token.replace("\\", "\\\\").replace('"', '\\"') for token in _TOKENS)
    words.write_text("".join(f'"{token}"\n' for token in escaped))
    started = time.perf_counter()
    last = [started]

    def entry(data: bytes) -> None:
        one(data)
        # libFuzzer ends the process; what was counted is told now and then.
        now = time.perf_counter()
        if now - last[0] > 10 or counts["runs"] == runs:
            last[0] = now
            line = json.dumps({**counts, "seconds": now - started})
            os.write(1, (line + "\n").encode())

    atheris.Setup(
        [sys.argv[0], f"-atheris_runs={runs}", f"-max_total_time={seconds}", f"-seed={seed + 1}",
         f"-dict={words}", "-max_len=4096", "-timeout=5", "-rss_limit_mb=2048",
         "-print_final_stats=1", f"-artifact_prefix={folder}/", folder],
        entry,
    )  # fmt: skip
    atheris.Fuzz()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", help="folder that keeps what was found")
    args = parser.parse_args()
    return fuzz(args.runs, args.seconds, args.seed, args.corpus)


if __name__ == "__main__":
    sys.exit(main())
