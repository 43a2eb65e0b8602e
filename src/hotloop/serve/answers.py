"""Arrays to the body of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy
import orjson

from .message import BINARY, JSON
from .tensors import InferRequest, Signature

_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_Head = tuple[bytes, list[tuple[bytes, bytes]], list[int]]


def infer_answer(
    asked: InferRequest,
    arrays: Sequence[numpy.ndarray],
    signature: Signature,
    model: str,
    version: str,
) -> tuple[bytes, bytes, list[tuple[bytes, bytes]]]:
    """Body, content type and headers of an infer answer.

    NaN and infinities are ``null`` in JSON, which has no word for them; binary tensors keep them.
    """
    layout = asked.layout
    if layout is not None:
        # The same question and the same shapes: only the bytes behind the JSON differ.
        key = (version, *[array.shape for array in arrays])
        if layout.answer_key == key:
            first, headers, order = cast(_Head, layout.answer_head)
            if len(order) == 1:
                return first + arrays[order[0]].tobytes(), BINARY, headers
            return b"".join([first, *[arrays[at].tobytes() for at in order]]), BINARY, headers
    names = [spec.name for spec in signature.outputs]
    wanted = asked.outputs
    if wanted is None:
        wanted = [(name, asked.binary) for name in names]
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if asked.id is not None:
        document["id"] = asked.id
    outputs: list[dict[str, Any]] = []
    order = []
    for name, binary in wanted:
        at = names.index(name)
        array = arrays[at]
        tensor: dict[str, Any] = {
            "name": name, "datatype": signature.output_types[at], "shape": array.shape
        }  # fmt: skip
        if binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            order.append(at)
        else:
            tensor["data"] = _plain(array).ravel()
        outputs.append(tensor)
    document["outputs"] = outputs
    first = orjson.dumps(document, option=_NUMPY)
    if not order:
        return first, JSON, []
    headers = [(b"inference-header-content-length", str(len(first)).encode())]
    if layout is not None and len(order) == len(wanted):
        layout.answer_key, layout.answer_head = key, (first, headers, order)
    return b"".join([first, *[arrays[at].tobytes() for at in order]]), BINARY, headers


def predict_answer(
    asked: InferRequest, arrays: Sequence[numpy.ndarray], signature: Signature, latency_s: float
) -> bytes:
    """Body of an answer of ``/predict``: outputs as nested lists, and the largest of each row."""
    document: dict[str, Any] = {}
    if asked.id is not None:
        document["id"] = asked.id
    document["outputs"] = {
        spec.name: _plain(array) for spec, array in zip(signature.outputs, arrays, strict=True)
    }
    first = arrays[0]
    if first.dtype.kind == "f" and first.ndim == 2 and first.shape[1] > 1:
        document["classes"] = first.argmax(axis=1)
    document["latency_ms"] = round(1000 * latency_s, 3)
    return orjson.dumps(document, option=_NUMPY)


def _plain(array: numpy.ndarray) -> numpy.ndarray:
    """Contiguous, in a type and byte order that the JSON writer takes."""
    if array.ndim == 0:
        array = array.reshape(1)
    return numpy.ascontiguousarray(array)
