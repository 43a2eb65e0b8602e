"""Tensors of a request to numpy arrays: strict, and never larger than what was sent.

Sizes are computed from shapes with Python's integers, which do not overflow, and compared with the
bytes or values that are there before an array is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from ..infer import TensorSpec
from .datatypes import protocol_name
from .json_body import parse_json
from .limits import Limits
from .message import Refusal
from .values import array_of, from_bytes, nesting_of, shape_of

_MAX_NAME = 256
_MAX_TENSORS = 64
_MAX_KNOWN = 256
_MAX_KNOWN_BYTES = 1024


@dataclass(slots=True)
class InferRequest:
    """What a client asks for.

    Attributes:
        arrays: one for each input of the model, in its order; they may not be writable.
        rows: size of the batch; 1 for a model without one.
        id: given back with the answer.
        timeout_s: the client's limit; ``None`` without one.
        outputs: names asked for and whether each is to be binary; ``None``: all of them.
        binary: whether outputs are binary where nothing else is said.
        layout: of the request, if all of its tensors are binary.
    """

    arrays: list[numpy.ndarray]
    rows: int
    id: str | None = None
    timeout_s: float | None = None
    outputs: list[tuple[str, bool]] | None = None
    binary: bool = False
    layout: Layout | None = None


class Layout:
    """Where the tensors of a request lie: what its JSON says, checked once.

    Clients send the same JSON with each request, and only the bytes behind it differ. Reading and
    checking it was half of the work of a small request.

    Args:
        places: start, end and shape of each input's bytes.
        nbytes: of all of them.
        request: the first with this JSON.

    Attributes:
        answer_key, answer_head: of the last answer, see ``answers.py``.
    """

    __slots__ = ("answer_head", "answer_key", "binary", "nbytes", "outputs", "places", "rows",
                 "timeout_s")  # fmt: skip

    def __init__(
        self,
        places: tuple[tuple[int, int, tuple[int, ...]], ...],
        nbytes: int,
        request: InferRequest,
    ) -> None:
        self.places = places
        self.nbytes = nbytes
        self.rows = request.rows
        self.timeout_s = request.timeout_s
        self.outputs = request.outputs
        self.binary = request.binary
        self.answer_key: object = None
        self.answer_head: object = None

    def read(self, binary: memoryview, signature: Signature) -> InferRequest:
        """A request with this JSON and these bytes.

        Raises:
            Refusal: there are more or less bytes.
        """
        if len(binary) != self.nbytes:
            raise Refusal(400, f"the tensors of this request have {self.nbytes} bytes")
        arrays = [
            from_bytes(binary[start:end], shape, spec)
            for (start, end, shape), spec in zip(self.places, signature.inputs, strict=True)
        ]
        return InferRequest(
            arrays, self.rows, None, self.timeout_s, self.outputs, self.binary, self
        )


@dataclass
class Signature:
    """Inputs and outputs of a model, ready for checking.

    Args:
        inputs, outputs: of the engine.

    Attributes:
        input_types, output_types: in the protocol's names.
        batched: whether the first dimension of all of them is the batch.
        layouts: of requests seen before, by their JSON.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_types: list[str] = field(init=False)
    output_types: list[str] = field(init=False)
    batched: bool = field(init=False)
    layouts: dict[bytes, Layout] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.input_types = [protocol_name(spec.dtype) for spec in self.inputs]
        self.output_types = [protocol_name(spec.dtype) for spec in self.outputs]
        both = (*self.inputs, *self.outputs)
        self.batched = all(bool(spec.shape) and spec.shape[0] is None for spec in both)

    def max_values(self, limits: Limits) -> int:
        """Values that JSON for this model may have: its elements, and what surrounds them."""
        elements = sum(
            math.prod(size if size is not None else limits.max_rows for size in spec.shape)
            for spec in self.inputs
        )
        # Twice: each element may stand in brackets of its own, as in [[1], [2]].
        return min(2 * elements + 4096, limits.max_json_bytes)


def parse_infer(
    body: bytes | bytearray, header_length: int | None, signature: Signature, limits: Limits
) -> InferRequest:
    """The body of an infer request of the Open Inference Protocol v2.

    Args:
        body: JSON, with the binary tensors behind it where ``header_length`` is given.
        header_length: ``Inference-Header-Content-Length``: bytes of the JSON.
        signature: what the model takes.
        limits: of the server.

    Raises:
        Refusal: 400 or 413, with what is wrong.
    """
    size = len(body) if header_length is None else header_length
    if not 0 < size <= len(body):
        raise Refusal(400, "Inference-Header-Content-Length must be within the body")
    if size > limits.max_json_bytes:
        raise Refusal(413, f"JSON has at most {limits.max_json_bytes} bytes")
    view = memoryview(body)
    top = bytes(view[:size])
    binary = view[size:] if header_length is not None else None
    known = signature.layouts.get(top) if binary is not None else None
    if known is not None and binary is not None:
        return known.read(binary, signature)
    document = _object(
        parse_json(top, max_depth=limits.max_json_depth, max_values=signature.max_values(limits)),
        "the request",
    )
    parameters = _parameters(document)
    given = _tensors(document, "inputs")
    arrays: list[numpy.ndarray | None] = [None] * len(signature.inputs)
    places: list[tuple[int, int, tuple[int, ...]] | None] = [None] * len(signature.inputs)
    used = 0
    for tensor in given:
        name = _name(tensor, "an input")
        at = next((i for i, spec in enumerate(signature.inputs) if spec.name == name), None)
        if at is None:
            names = ", ".join(spec.name for spec in signature.inputs)
            raise Refusal(400, f"the model has no such input; it has {names}"[:500])
        if arrays[at] is not None:
            raise Refusal(400, f"input {name} is given twice")
        spec, datatype = signature.inputs[at], signature.input_types[at]
        if tensor.get("datatype") != datatype:
            raise Refusal(400, f"input {name} must have datatype {datatype}")
        shape = shape_of(tensor.get("shape"), spec, limits)
        nbytes = math.prod(shape) * numpy.dtype(spec.dtype).itemsize
        binary_size = _parameters(tensor).get("binary_data_size")
        if binary_size is None:
            if "data" not in tensor:
                raise Refusal(400, f"input {name} needs data, or binary_data_size")
            arrays[at] = array_of(tensor["data"], shape, spec)
            continue
        if binary is None:
            raise Refusal(400, "binary tensors need Inference-Header-Content-Length")
        if "data" in tensor:
            raise Refusal(400, f"input {name} has both data and binary_data_size")
        if type(binary_size) is not int or binary_size != nbytes:
            raise Refusal(400, f"input {name} of this shape has {nbytes} bytes"[:300])
        if nbytes > len(binary) - used:
            raise Refusal(400, f"the body ends inside input {name}")
        arrays[at] = from_bytes(binary[used : used + nbytes], shape, spec)
        places[at] = (used, used + nbytes, shape)
        used += nbytes
    if binary is not None and used != len(binary):
        raise Refusal(400, "the body has bytes that belong to no input")
    whole = _all_there(arrays, signature)
    asked, default_binary = _outputs(document, parameters, signature)
    request = InferRequest(
        whole, _rows(whole, signature, limits), _id(document), _timeout_s(parameters), asked,
        default_binary,
    )  # fmt: skip
    known_places = [place for place in places if place is not None]
    if len(known_places) == len(whole) and request.id is None and size <= _MAX_KNOWN_BYTES:
        if len(signature.layouts) >= _MAX_KNOWN:
            signature.layouts.clear()
        request.layout = signature.layouts[top] = Layout(tuple(known_places), used, request)
    return request


def parse_predict(body: bytes | bytearray, signature: Signature, limits: Limits) -> InferRequest:
    """The body of ``/predict``: ``{"inputs": nested lists}``, or an object of them by name.

    A single sample may come without the dimension of the batch.

    Raises:
        Refusal: 400 or 413, with what is wrong.
    """
    if len(body) > limits.max_json_bytes:
        raise Refusal(413, f"JSON has at most {limits.max_json_bytes} bytes")
    document = _object(
        parse_json(body, max_depth=limits.max_json_depth, max_values=signature.max_values(limits)),
        "the request",
    )
    unknown = set(document) - {"inputs", "id", "parameters"}
    if unknown:
        raise Refusal(400, "the request takes inputs, id and parameters")
    inputs = document.get("inputs")
    if not isinstance(inputs, dict):
        if len(signature.inputs) != 1:
            names = ", ".join(spec.name for spec in signature.inputs)
            raise Refusal(400, f"inputs must be an object with {names}"[:500])
        inputs = {signature.inputs[0].name: inputs}
    if set(inputs) != {spec.name for spec in signature.inputs}:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise Refusal(400, f"inputs must be {names}"[:500])
    arrays: list[numpy.ndarray | None] = []
    for spec in signature.inputs:
        value = inputs[spec.name]
        found = nesting_of(value, limits)
        if signature.batched and len(found) == len(spec.shape) - 1:
            found, value = [1, *found], [value]
        arrays.append(array_of(value, shape_of(found, spec, limits), spec))
    whole = _all_there(arrays, signature)
    return InferRequest(
        whole, _rows(whole, signature, limits), _id(document), _timeout_s(_parameters(document))
    )


def _all_there(arrays: Sequence[numpy.ndarray | None], signature: Signature) -> list[numpy.ndarray]:
    whole = [array for array in arrays if array is not None]
    if len(whole) != len(signature.inputs):
        missing = next(
            spec.name for spec, a in zip(signature.inputs, arrays, strict=True) if a is None
        )
        raise Refusal(400, f"input {missing} is missing")
    return whole


def _rows(arrays: Sequence[numpy.ndarray], signature: Signature, limits: Limits) -> int:
    if not signature.batched:
        return 1
    rows = len(arrays[0])
    if any(len(array) != rows for array in arrays):
        raise Refusal(400, "all inputs must have the same number of rows")
    if rows > limits.max_rows:
        raise Refusal(413, f"a request has at most {limits.max_rows} rows")
    return rows


def _outputs(
    document: dict[str, Any], parameters: dict[str, Any], signature: Signature
) -> tuple[list[tuple[str, bool]] | None, bool]:
    default = parameters.get("binary_data_output", False)
    if type(default) is not bool:
        raise Refusal(400, "binary_data_output must be true or false")
    if document.get("outputs") in (None, []):  # Clients say "all of them" in three ways.
        return None, default
    asked: list[tuple[str, bool]] = []
    for tensor in _tensors(document, "outputs"):
        name = _name(tensor, "an output")
        if name not in [spec.name for spec in signature.outputs]:
            names = ", ".join(spec.name for spec in signature.outputs)
            raise Refusal(400, f"the model has no such output; it has {names}"[:500])
        if name in [known for known, _ in asked]:
            raise Refusal(400, f"output {name} is asked for twice")
        its = _parameters(tensor)
        if "classification" in its or "shared_memory_region" in its:
            raise Refusal(400, "outputs are served as tensors: no classification, no shared memory")
        binary = its.get("binary_data", default)
        if type(binary) is not bool:
            raise Refusal(400, "binary_data must be true or false")
        asked.append((name, binary))
    return asked, default


def _timeout_s(parameters: dict[str, Any]) -> float | None:
    micros = parameters.get("timeout")
    if micros is None or (type(micros) is int and micros == 0):
        return None
    if type(micros) is not int or not 0 < micros < 2**53:
        raise Refusal(400, "timeout must be a number of microseconds, 0 for none")
    return micros / 1e6


def _id(document: dict[str, Any]) -> str | None:
    found = document.get("id")
    if found is None:
        return None
    if not isinstance(found, str) or len(found) > _MAX_NAME:
        raise Refusal(400, f"id must be text of at most {_MAX_NAME} characters")
    return found


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(400, f"{what} must be a JSON object")
    return value


def _parameters(document: dict[str, Any]) -> dict[str, Any]:
    found = document.get("parameters")
    if found is None:
        return {}
    parameters = _object(found, "parameters")
    if "shared_memory_region" in parameters:
        raise Refusal(400, "shared memory is not served")
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise Refusal(400, "sequences are not served")
    return parameters


def _tensors(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not found or len(found) > _MAX_TENSORS:
        raise Refusal(400, f"{key} must be a list of tensors")
    return [_object(tensor, "a tensor") for tensor in found]


def _name(tensor: dict[str, Any], what: str) -> str:
    name = tensor.get("name")
    if not isinstance(name, str) or len(name) > _MAX_NAME:
        raise Refusal(400, f"{what} must have a name of at most {_MAX_NAME} characters")
    return name
