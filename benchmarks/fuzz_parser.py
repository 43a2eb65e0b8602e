"""Coverage-guided fuzzing of the tensor parser: ``benchmarks/fuzz_parser.py -runs=1000000``.

Arguments are libFuzzer's. Needs ``pip install 'hotloop[fuzz]'``. An input is two bytes, the length
of the JSON, and the body. A find is written to the working folder and ends the run.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hotloop.serve"]):
    from hotloop.serve import tensors
    from hotloop.serve.limits import Limits

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serve"))
import fuzzing

LIMITS = Limits(max_body_bytes=1_000_000, max_json_bytes=100_000)
SEEDS = (
    {"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[1.5, -2e3]]},
        {"name": "n", "datatype": "INT64", "shape": [1, 1], "data": [7]},
    ], "outputs": [{"name": "y", "parameters": {"binary_data": True}}], "id": "1"},
    {"inputs": [
        {"name": "x", "datatype": "FP32", "shape": [2, 2], "parameters": {"binary_data_size": 16}},
        {"name": "n", "datatype": "INT64", "shape": [2, 1], "parameters": {"binary_data_size": 16}},
    ], "parameters": {"binary_data_output": True, "timeout": 1000}},
    {"inputs": {"x": [[1, 2]], "n": [[3, 4]]}},
)  # fmt: skip
WORDS = (
    "inputs outputs name datatype shape data parameters binary_data_size binary_data timeout id "
    "binary_data_output FP32 INT64 sequence_id shared_memory_region 9223372036854775808 -1 1e400"
)


def one(data: bytes) -> None:
    length = struct.unpack_from("<H", data)[0] if len(data) > 1 else 0
    body = data[2:]
    top, tail = (body[:length], body[length:]) if 0 < length <= len(body) else (body, None)
    fuzzing.check((top, tail), LIMITS)


def main() -> None:
    assert tensors.parse_infer is fuzzing.parse_infer
    with tempfile.TemporaryDirectory() as folder:
        for at, seed in enumerate(SEEDS):
            top = json.dumps(seed).encode()
            start = struct.pack("<H", len(top))
            (Path(folder) / str(at)).write_bytes(start + top + bytes(32 if at == 1 else 0))
        words = Path(folder).with_suffix(".dict")
        words.write_text("".join(f'"{word}"\n' for word in WORDS.split()))
        options = ["-max_len=700", f"-dict={words}", *sys.argv[1:]]
        atheris.Setup([sys.argv[0], *options, folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
