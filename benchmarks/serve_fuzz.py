"""Fuzzing of the server: schemathesis on its OpenAPI document, atheris on the tensor parser.

    python benchmarks/serve_fuzz.py parser [--runs 1000000] [--seconds 120]
    python benchmarks/serve_fuzz.py api FOLDER_OR_ONNX [--max-examples 200] [--seed 0]

`parser` lets atheris (libFuzzer for Python, coverage-guided) mutate the bodies of good requests to
the v2 protocol and to /predict and gives each to the parser. Any exception but a refusal with a 4xx
status is a crash, and so is an accepted request whose arrays do not fit the model. `api` serves a
model and lets schemathesis make requests from /openapi.json, good ones and bad ones, and check the
answers: no 5xx, statuses and bodies as documented. Both print what they did; exit code 1: a crash.

`pip install 'hotloop[fuzz,clients]'` brings both.
"""

import argparse
import json
import math
import os
import re
import subprocess
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


def fuzz_parser(runs: int, seconds: int, seed: int, corpus: str | None) -> int:
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


def fuzz_api(model: Path, max_examples: int, seed: int) -> int:
    """schemathesis against a server; its exit code."""
    from serving import Served

    with Served(model) as served:
        before = served.resident_bytes
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json",
             "--max-examples", str(max_examples), "--seed", str(seed), "--mode", "all",
             "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,"
             "response_schema_conformance", "--no-color"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        after = served.resident_bytes
        lived = served.process.poll() is None
    print(done.stdout[-6000:])
    told = re.findall(r"(\d+) generated", done.stdout)
    print(json.dumps({"test_cases": told[-1] if told else None, "exit_code": done.returncode,
                      "server_lived": lived, "resident_before_bytes": before,
                      "resident_after_bytes": after}))  # fmt: skip
    return 0 if done.returncode == 0 and lived else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    tensors = kinds.add_parser("parser")
    tensors.add_argument("--runs", type=int, default=1_000_000)
    tensors.add_argument("--seconds", type=int, default=120)
    tensors.add_argument("--seed", type=int, default=0)
    tensors.add_argument("--corpus", help="folder that keeps what was found")
    api = kinds.add_parser("api")
    api.add_argument("model", type=Path)
    api.add_argument("--max-examples", type=int, default=200)
    api.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind == "parser":
        return fuzz_parser(args.runs, args.seconds, args.seed, args.corpus)
    return fuzz_api(args.model, args.max_examples, args.seed)


if __name__ == "__main__":
    sys.exit(main())
