"""Abuse of a running server, case by case: what it answers, what memory it takes, and if it lives.

    python benchmarks/serve_abuse.py FOLDER_OR_ONNX [--json FILE]

Each case is a function of the server that gives the status lines it saw; a case holds if they are
those it allows, if the server answers a good request right after, and if resident memory has not
grown by more than a bound. The server runs with short timeouts (2 s), so that slow cases end soon.
"""

import argparse
import contextlib
import gzip
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serving import Served

from hotloop.bench.requests import target_of

FLAGS = ("--header-timeout-s", "2", "--body-timeout-s", "2", "--idle-timeout-s", "5")
_GROWTH_BYTES = 64 * 2**20


def _status(connection: socket.socket) -> int | None:
    """Of the answer that comes; ``None``: the server closed without one."""
    data = b""
    with contextlib.suppress(OSError):
        while b"\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                break
            data += more
    return int(data.split()[1]) if data.startswith(b"HTTP/1.1 ") else None


def _send(served: Served, head: str, body: bytes = b"", *, finish: bool = True) -> int | None:
    with served.connect(20) as connection:
        # The server may answer and close before it has read all.
        with contextlib.suppress(OSError):
            connection.sendall(head.replace("\n", "\r\n").encode("latin-1") + body)
            if finish:
                connection.shutdown(socket.SHUT_WR)
        return _status(connection)


def _post(served: Served, path: str, body: bytes, *headers: str) -> int | None:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return _send(served, "\n".join(lines) + "\n\n", body, finish=False)


def _infer(served: Served, document: object, *headers: str) -> int | None:
    path = f"/v2/models/{served.told['name']}/infer"
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return _post(served, path, text, "Content-Type: application/json", *headers)


def _tensor(served: Served, **changed: object) -> dict:
    spec = served.model["inputs"][0]
    shape = [1 if size < 0 else size for size in spec["shape"]]
    count = 1
    for size in shape:
        count *= size
    tensor = {"name": spec["name"], "shape": shape, "datatype": spec["datatype"],
              "data": [0.5] * count}  # fmt: skip
    return {"inputs": [{**tensor, **changed}]}


def slow_headers(served: Served) -> list[int | None]:
    """200 connections send a byte of their header every 0.2 s."""
    connections = [served.connect() for _ in range(200)]
    text = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1000
    for at in range(25):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(text[at : at + 1])
        time.sleep(0.2)
    found = [_status(connection) for connection in connections]
    for connection in connections:
        connection.close()
    return found


def slow_bodies(served: Served) -> list[int | None]:
    """100 connections promise a megabyte and send a byte every 0.2 s."""
    head = (
        f"POST /v2/models/{served.told['name']}/infer HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Length: 1000000\r\n\r\n"
    ).encode()
    connections = [served.connect() for _ in range(100)]
    for connection in connections:
        connection.sendall(head)
    for _ in range(25):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(b"{")
        time.sleep(0.2)
    found = [_status(connection) for connection in connections]
    for connection in connections:
        connection.close()
    return found


def one_byte_chunks(served: Served) -> list[int | None]:
    """A million chunks of one byte each."""
    head = (
        f"POST /v2/models/{served.told['name']}/infer HTTP/1.1\nHost: localhost\n"
        "Transfer-Encoding: chunked\n\n"
    )
    return [_send(served, head, b"1\r\n \r\n" * 1_000_000 + b"0\r\n\r\n")]


def gzip_bomb(served: Served) -> list[int | None]:
    """A gigabyte of zeros in a megabyte."""
    bomb = gzip.compress(b"\0" * 2**26) * 16
    return [_infer(served, bomb, "Content-Encoding: gzip"),
            _infer(served, bomb, "Content-Encoding: deflate, gzip")]  # fmt: skip


def endless_header(served: Served) -> list[int | None]:
    """A header of 10 MB, and one hundred thousand headers."""
    start = "GET /v2/health/live HTTP/1.1\nHost: localhost\n"
    return [
        _send(served, start + "X: " + "a" * 10_000_000 + "\n\n"),
        _send(served, start + "".join(f"X{i}: 1\n" for i in range(100_000)) + "\n"),
        _send(served, "GET /" + "a" * 10_000_000 + " HTTP/1.1\nHost: localhost\n\n"),
    ]


def promised_length(served: Served) -> list[int | None]:
    """Lengths beyond the limit, negative, twice, and beside chunks."""
    start = f"POST /v2/models/{served.told['name']}/infer HTTP/1.1\nHost: localhost\n"
    return [
        _send(served, start + f"Content-Length: {length}\n\n", finish=False)
        for length in ("1000000000000", "99999999999999999999999", "-1", "0x10", "1, 2")
    ] + [
        _send(served, start + "Content-Length: 5\nTransfer-Encoding: chunked\n\n", b"hello"),
        _send(served, start + "Content-Length: 5\nContent-Length: 6\n\n", b"hello!"),
    ]


def shapes(served: Served) -> list[int | None]:
    """Huge, overflowing, negative, empty, fractional and nested shapes."""
    rank = len(served.model["inputs"][0]["shape"])
    listed = [
        [2**40] + [1] * (rank - 1), [2**31] * rank, [2**63] * rank, [2**64 + 1] + [1] * (rank - 1),
        [-1] * rank, [0] * rank, [1.5] * rank, ["1"] * rank, [[1]] * rank, [], [1] * 1000, None,
        {"0": 1}, True,
    ]  # fmt: skip
    found = [_infer(served, _tensor(served, shape=shape)) for shape in listed]
    head = json.dumps(
        {"inputs": [{**_tensor(served)["inputs"][0], "data": None,
                     "shape": [2**32, 2**32] + [1] * (rank - 2),
                     "parameters": {"binary_data_size": 0}}]}
    ).encode()  # fmt: skip
    found.append(_infer(served, head, f"Inference-Header-Content-Length: {len(head)}"))
    for length in (len(head) + 1, 2**63, -1, "x"):
        found.append(_infer(served, head, f"Inference-Header-Content-Length: {length}"))
    return found


def values(served: Served) -> list[int | None]:
    """NaN, infinities, numbers beyond the type, and everything that is no number."""
    count = len(_tensor(served)["inputs"][0]["data"])
    found = []
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "1e39", "null", '"1"', "{}", "[]"):
        text = json.dumps(_tensor(served)).replace("0.5", value, 1)
        found.append(_infer(served, text.encode()))
    for data in (None, 5, "a" * count, {"a": 1}, [0.5] * (count - 1), [0.5] * (count + 1), []):
        found.append(_infer(served, _tensor(served, data=data)))
    return found


def deep_json(served: Served) -> list[int | None]:
    """A hundred thousand brackets; a million keys; duplicate keys; bad UTF-8."""
    deep = b"[" * 100_000
    return [
        _infer(served, deep), _infer(served, deep + b"]" * 100_000),
        _infer(served, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        _infer(served, b'{"inputs":' + deep + b"}"),
        _infer(served, b"{" + b",".join(b'"k%d":1' % i for i in range(500_000)) + b"}"),
        _infer(served, b"\xff\xfe{}"), _infer(served, b'{"inputs": "\xed\xa0\x80"}'),
        _infer(served, b""), _infer(served, b"null"), _infer(served, b"[]"), _infer(served, b"{"),
    ]  # fmt: skip


def wrong_types(served: Served) -> list[int | None]:
    """The right shape under a wrong datatype or name, twice, or with unknown outputs."""
    good = _tensor(served)["inputs"][0]
    return [
        *(_infer(served, _tensor(served, datatype=kind)) for kind in
          ("FP64", "INT64", "BYTES", "FP33", "", None, 7, [])),
        _infer(served, _tensor(served, name="no such input")),
        _infer(served, _tensor(served, name=None)),
        _infer(served, {"inputs": [good, good]}),
        _infer(served, {"inputs": []}), _infer(served, {"inputs": good}), _infer(served, {}),
        _infer(served, {"inputs": [good], "outputs": [{"name": "no such output"}]}),
        _infer(served, {"inputs": [good], "parameters": {"timeout": -1}}),
        _infer(served, {"inputs": [good], "id": 7}),
    ]  # fmt: skip


def no_http(served: Served) -> list[int | None]:
    """Bytes that are no HTTP, a TLS greeting, another version, and a smuggled request."""
    with served.connect() as connection:
        connection.sendall(bytes(range(256)) * 10)
        first = _status(connection)
    return [
        first,
        _send(served, "\x16\x03\x01\x02\x00\x01" + "\0" * 500),
        _send(served, "GET / HTTP/9.9\nHost: localhost\n\n"),
        _send(served, "PRI * HTTP/2.0\n\nSM\n\n"),
        _send(served, "GET /../../etc/passwd HTTP/1.1\nHost: localhost\n\n"),
        _send(served, "GET /v2/models/..%2f..%2fetc HTTP/1.1\nHost: localhost\n\n"),
        _send(served, "GET /v2 HTTP/1.1\nHost: elsewhere.example\n\n"),
        _send(served, "BREW /v2 HTTP/1.1\nHost: localhost\n\n"),
    ]


CLIENT_ERRORS = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 417, 421, 422, 431, 501, 505})
# What a case may be answered with; closing without an answer is right where no request was whole.
CASES: dict[Callable[[Served], list[int | None]], frozenset[int | None]] = {
    slow_headers: frozenset({408, None}),
    slow_bodies: frozenset({408, None}),
    one_byte_chunks: frozenset({400, 413}),
    gzip_bomb: frozenset({415}),
    # What was answered may be lost when the rest of the flood meets a closed socket.
    endless_header: frozenset({400, 414, 431, None}),
    promised_length: frozenset({400, 413, None}),
    shapes: frozenset({400, 413}),
    values: frozenset({400}),
    deep_json: frozenset({400, 413}),
    wrong_types: frozenset({400}),
    no_http: CLIENT_ERRORS | {None},
}


def run_cases(path: Path) -> list[dict]:
    """Every case in turn against one server."""
    rows = []
    with Served(path, *FLAGS) as served:
        target = target_of(served.address)
        served.model = target.model
        served.told["name"] = target.model["name"]

        def serves() -> bool:
            with served.connect() as connection:
                connection.sendall(target.requests[0])
                return _status(connection) == 200

        if not serves():
            raise RuntimeError("the server must answer a good request")
        for case, allowed in CASES.items():
            before = served.resident_bytes
            started = time.perf_counter()
            found = case(served)
            rows.append(
                {
                    "case": case.__name__.replace("_", " "), "what": case.__doc__,
                    "answers": {str(s): found.count(s) for s in sorted(set(found), key=str)},
                    "not_allowed": [s for s in found if s not in allowed],
                    "still_serves": serves(),
                    "resident_before_bytes": before, "resident_after_bytes": served.resident_bytes,
                    "peak_bytes": served.peak_bytes, "seconds": time.perf_counter() - started,
                }
            )  # fmt: skip
            last = rows[-1]
            last["holds"] = (
                not last["not_allowed"] and last["still_serves"]
                and last["resident_after_bytes"] - before < _GROWTH_BYTES
            )  # fmt: skip
            print(
                f"  {'holds' if last['holds'] else 'FAILS'}  {last['case']:<16} "
                f"{last['answers']}  {last['resident_after_bytes'] / 2**20:.0f} MiB, "
                f"{last['seconds']:.1f} s"
            )
        rows.append({"case": "stops at SIGTERM", "exit_code": served.stop(), "holds": True})
        rows[-1]["holds"] = rows[-1]["exit_code"] == 0
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = run_cases(args.model)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
