"""Requests for the load generator: random tensors that fit a model, as whole HTTP/1.1 requests."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from ..errors import InputError, RunError
from ..serve.datatypes import TO_NUMPY

FORMATS = ("binary", "json", "predict")
# Different bodies, sent in turn.
_BODIES = 8
_ASK_S = 10.0


@dataclass(frozen=True)
class Target:
    """Where requests go, and they themselves.

    Attributes:
        host, port: of the server.
        requests: whole requests, head and body.
        rows: samples in each.
        model: the answer to the question for the model's metadata; empty for a body of a file.
    """

    host: str
    port: int
    requests: tuple[bytes, ...]
    rows: int
    model: dict[str, Any]


def target_of(
    url: str,
    *,
    fmt: str = "binary",
    rows: int = 1,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Target:
    """Requests for a server of the Open Inference Protocol v2.

    Args:
        url: ``http://HOST:PORT/v2/models/NAME``, or ``http://HOST:PORT`` of ``hotloop serve``; with
            a ``body``, the path it is posted to.
        fmt: ``"binary"``: tensors as bytes after a short JSON head; ``"json"``; ``"predict"``: the
            plain JSON of ``/predict``.
        rows: samples a request.
        body: sent as it is instead of tensors.
        headers: besides those needed, such as ``Authorization``.

    Raises:
        InputError: the URL cannot be used, or the model has inputs of another kind.
        RunError: the server does not answer as the protocol says.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        parts, host, port = urllib.parse.urlsplit(""), None, 80
    if parts.scheme != "http" or host is None:
        raise InputError(
            "load is sent over plain HTTP to one server", got=url,
            next_step="write http://127.0.0.1:8000",
        )  # fmt: skip
    if rows < 1:
        raise InputError("rows of a request must be at least 1", got=rows)
    extra = dict(headers or {})
    if body is not None:
        kind = {"Content-Type": "application/json"}
        whole = request_bytes(host, port, parts.path or "/", body, kind | extra)
        return Target(host, port, (whole,), rows, {})
    path = parts.path.rstrip("/").removesuffix("/infer").removesuffix("/predict")
    if not path:
        path = "/v2/models/" + urllib.parse.quote(
            str(_ask(host, port, "/stats", extra).get("model", {}).get("name"))
        )
    model = _ask(host, port, path, extra)
    draw = numpy.random.default_rng(seed)
    made = []
    for _ in range(_BODIES):
        arrays = [(t, _random(t, rows, draw)) for t in model["inputs"]]
        content, more = encode(fmt, arrays)
        to = "/predict" if fmt == "predict" else path + "/infer"
        made.append(request_bytes(host, port, to, content, more | extra))
    return Target(host, port, tuple(made), rows, model)


def request_bytes(
    host: str, port: int, path: str, body: bytes, headers: Mapping[str, str]
) -> bytes:
    """A whole POST request."""
    for name, value in headers.items():
        if not (name + value).isprintable() or ":" in name:
            raise InputError("a header is a name and a value in one line", got=repr(name))
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def encode(
    fmt: str, arrays: Sequence[tuple[Mapping[str, Any], numpy.ndarray]]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers for inputs (metadata and array each) in one of ``FORMATS``."""
    if fmt == "predict":
        inputs = {spec["name"]: array.tolist() for spec, array in arrays}
        return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}
    tensors = [
        {
            "name": spec["name"], "shape": list(array.shape), "datatype": spec["datatype"],
            **(
                {"parameters": {"binary_data_size": array.nbytes}}
                if fmt == "binary"
                else {"data": array.ravel().tolist()}
            ),
        }
        for spec, array in arrays
    ]  # fmt: skip
    if fmt == "json":
        return json.dumps({"inputs": tensors}).encode(), {"Content-Type": "application/json"}
    if fmt != "binary":
        raise InputError(f"formats are {', '.join(FORMATS)}", got=fmt)
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(array.tobytes() for _, array in arrays), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def _random(tensor: Mapping[str, Any], rows: int, draw: numpy.random.Generator) -> numpy.ndarray:
    shape = [int(size) for size in tensor["shape"]]
    shape = [rows if at == 0 and size < 0 else abs(size) for at, size in enumerate(shape)]
    name = TO_NUMPY.get(tensor["datatype"])
    if name is None:
        raise InputError("load is made of numbers", got=f"input {tensor['datatype']}")
    dtype = numpy.dtype(name)
    if dtype.kind == "f":
        return draw.standard_normal(shape).astype(dtype)
    return draw.integers(0, 2, shape).astype(dtype)


def _ask(host: str, port: int, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_S)
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RunError(
                f"http://{host}:{port}{path} must tell the model", got=f"status {answer.status}",
                next_step="name it: http://HOST:PORT/v2/models/NAME",
            )  # fmt: skip
        document = json.loads(content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise RunError(
            f"http://{host}:{port}{path} must answer as the Open Inference Protocol says",
            got=f"{type(error).__name__}: {error}", next_step="start hotloop serve",
        ) from None  # fmt: skip
    finally:
        connection.close()
    if not isinstance(document, dict):
        raise RunError(f"http://{host}:{port}{path} must answer with an object")
    return document
