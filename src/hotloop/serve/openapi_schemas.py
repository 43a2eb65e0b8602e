"""Schemas of the bodies that the server takes and gives, written for the model at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .datatypes import TO_NUMPY

_Schema = dict[str, Any]
_TEXT = {"type": "string"}
_YES = {"const": True}
_BASE64 = {"type": "string", "contentEncoding": "base64"}


def schemas(metadata: dict[str, Any]) -> dict[str, _Schema]:
    """By name, for ``#/components/schemas``; ``metadata`` as the protocol has it."""
    return {
        "Any": {"type": "object"},
        "AttestationRequest": _object({"challenge": _BASE64}),
        "AttestationResponse": _object({"kind": _TEXT, "evidence": _BASE64}),
        "Error": _object({"error": _TEXT}),
        "Live": _object({"live": _YES}),
        "Ready": _object({"ready": _YES}),
        "ServerMetadata": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
        "ModelMetadata": _model_metadata(),
        "InferRequest": _infer_request(metadata),
        "InferResponse": _infer_response(),
        "PredictRequest": _predict_request(),
        "PredictResponse": _predict_response(),
        "Stats": {
            "type": "object",
            "required": ["model", "requests", "queue_requests", "best_batch_rows"],
        },
    }


def _object(properties: _Schema, required: Sequence[str] | None = None) -> _Schema:
    """An object; all properties are required where ``required`` does not say which."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": names}


def _list(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


def _tensor_metadata() -> _Schema:
    return _object(
        {"name": _TEXT, "datatype": {"enum": list(TO_NUMPY)}, "shape": _list({"type": "integer"})}
    )


def _model_metadata() -> _Schema:
    tensors = _list(_tensor_metadata())
    return _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": tensors,
            "outputs": tensors,
        },
        required=("name", "platform", "inputs", "outputs"),
    )


def _parameters() -> _Schema:
    return {
        "type": "object",
        "properties": {
            "timeout": {"type": "integer", "minimum": 1, "description": "Microseconds."},
            "binary_data_output": {"type": "boolean"},
        },
    }


def _infer_request(metadata: dict[str, Any]) -> _Schema:
    inputs, outputs = metadata["inputs"], metadata["outputs"]
    binary = {"type": "object", "properties": {"binary_data": {"type": "boolean"}}}
    output = _object(
        {"name": {"enum": [t["name"] for t in outputs]}, "parameters": binary}, required=("name",)
    )
    return _object(
        {
            "id": {"type": "string", "maxLength": 256},
            "parameters": _parameters(),
            "inputs": {
                **_list({"anyOf": [_input(tensor) for tensor in inputs]}),
                "minItems": len(inputs),
                "maxItems": len(inputs),
            },
            "outputs": {**_list(output), "minItems": 1, "maxItems": len(outputs)},
        },
        required=("inputs",),
    )


def _infer_response() -> _Schema:
    tensor = _tensor_metadata()
    tensor["properties"] |= {"data": {"type": "array"}, "parameters": {"type": "object"}}
    return _object(
        {"model_name": _TEXT, "model_version": _TEXT, "id": _TEXT, "outputs": _list(tensor)},
        required=("model_name", "outputs"),
    )


def _predict_request() -> _Schema:
    properties = {
        "id": {"type": "string", "maxLength": 256},
        "inputs": {
            "description": "Nested lists, or an object of them by the input's name.",
            "type": ["array", "object", "number", "boolean"],
        },
        "parameters": _parameters(),
    }
    return {**_object(properties, required=("inputs",)), "additionalProperties": False}


def _predict_response() -> _Schema:
    return _object(
        {
            "id": _TEXT,
            "outputs": {"type": "object"},
            "classes": _list({"type": "integer"}),
            "latency_ms": {"type": "number"},
        },
        required=("outputs", "latency_ms"),
    )


def _input(tensor: dict[str, Any]) -> _Schema:
    """A tensor of the model's: its own name, datatype and shape; small batches."""
    sizes = [
        {"type": "integer", "minimum": 1, "maximum": 4} if size < 0 else {"const": size}
        for size in tensor["shape"]
    ]
    kind = "number" if tensor["datatype"].startswith("FP") else "integer"
    value = {"type": "boolean" if tensor["datatype"] == "BOOL" else kind}
    shape = {"type": "array", "prefixItems": sizes}
    return _object(
        {
            "name": {"const": tensor["name"]},
            "datatype": {"const": tensor["datatype"]},
            "shape": {**shape, "minItems": len(sizes), "maxItems": len(sizes)},
            "data": _list({"anyOf": [value, {"type": "array"}]}),
        }
    )
