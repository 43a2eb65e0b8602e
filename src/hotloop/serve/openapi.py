"""The server's interface as an OpenAPI 3.1 document, written for the model at hand."""

from __future__ import annotations

import math
from typing import Any

from ..version import VERSION
from .limits import Limits
from .openapi_schemas import schemas

_MAX_EXAMPLE = 1024  # Values.
_ERRORS = {
    "400": "The request is not what the model takes; the text says why.",
    "401": "A token is needed.",
    "403": "Not allowed.",
    "404": "Nothing is at this path.",
    "405": "The path has another method.",
    "408": "Headers or body took too long.",
    "413": "The body, its JSON, its chunks or its rows are more than the limit.",
    "415": "The body is compressed.",
    "421": "The server is not known by the name in Host.",
    "429": "The queue is full, or the deadline cannot be kept.",
    "431": "The headers are more than the limit.",
    "500": "The model failed on this input.",
    "503": "The server is stopping.",
    "504": "The deadline passed before the answer was there.",
}
_ALWAYS = ("400", "405", "408", "413", "421", "431")
_INFER = ("403", "415", "429", "500", "503", "504")
_RETRY = {"retry-after": {"description": "Seconds.", "schema": {"type": "string"}}}


def openapi_document(
    metadata: dict[str, Any], *, tokens: bool, limits: Limits, attestation: bool = False
) -> dict[str, Any]:
    """The document.

    Args:
        metadata: of the model, as the protocol has it.
        tokens: whether requests need one.
        limits: named in the descriptions.
        attestation: whether the server proves what it runs.
    """
    name = metadata["name"]
    base = f"/v2/models/{name}"
    get = _operation(tokens)
    paths: dict[str, Any] = {
        "/v2": {"get": get("Server metadata", "ServerMetadata")},
        "/v2/health/live": {"get": _operation(False)("Whether the process lives", "Live")},
        "/v2/health/ready": {
            "get": _operation(False)("Whether it takes requests", "Ready", ("503",))
        },
        base: {"get": get("Model metadata", "ModelMetadata")},
        f"{base}/ready": {"get": get("Whether the model takes requests", "Ready", ("503",))},
        f"{base}/infer": {
            "post": get("Inference by the Open Inference Protocol v2", "InferResponse", _INFER)
            | {
                "description": "JSON tensors here; with Inference-Header-Content-Length the body "
                "is the JSON followed by the binary tensors.",
                "parameters": [_TIMEOUT],
                "requestBody": _body("InferRequest", infer_example(metadata)),
            }
        },
        "/predict": {
            "post": get("Inference with nested lists", "PredictResponse", _INFER)
            | {
                "parameters": [_TIMEOUT],
                "requestBody": _body("PredictRequest", predict_example(metadata)),
            }
        },
        "/stats": {"get": get("Latency, queue and batches", "Stats")},
        "/metrics": {"get": get("Metrics in Prometheus' text format", None)},
        "/openapi.json": {"get": get("This document", "Any")},
    }
    if tokens:
        paths[f"/v2/repository/models/{name}/load"] = {
            "post": get("Load the model's files again", "Any", ("403", "415", "500", "503"))
        }
    if attestation:
        paths["/attestation"] = {
            "post": _operation(False)(
                "Evidence of what runs here", "AttestationResponse", ("415", "500", "503")
            )
            | {"requestBody": _body("AttestationRequest", {"challenge": "A" * 43 + "="})}
        }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": f"hotloop: {name}",
            "version": VERSION,
            "description": f"Bodies have at most {limits.max_body_bytes} bytes, JSON at most "
            f"{limits.max_json_bytes}, requests at most {limits.max_rows} rows.",
        },
        "paths": paths,
        "components": {"schemas": schemas(metadata)},
    }
    if tokens:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return document


_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "Milliseconds after which nobody waits for the answer.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 99999999999},
}


def infer_example(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """A request that the model takes; ``None`` where it would be long."""
    tensors = []
    for tensor in metadata["inputs"]:
        shape = [1 if size < 0 else size for size in tensor["shape"]]
        if math.prod(shape) > _MAX_EXAMPLE:
            return None
        value = False if tensor["datatype"] == "BOOL" else 0
        tensors.append({**tensor, "shape": shape, "data": [value] * math.prod(shape)})
    return {"inputs": tensors}


def predict_example(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The same for ``/predict``."""
    example = infer_example(metadata)
    if example is None:
        return None
    return {"inputs": {t["name"]: _nested(t["data"], t["shape"]) for t in example["inputs"]}}


def _nested(values: list[Any], shape: list[int]) -> Any:
    if len(shape) < 2:
        return values if shape else values[0]
    size = len(values) // shape[0]
    return [_nested(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def _body(schema: str, example: dict[str, Any] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    if example is not None:
        content["example"] = example
    return {"required": True, "content": {"application/json": content}}


def _operation(tokens: bool) -> Any:
    def made(summary: str, schema: str | None, errors: tuple[str, ...] = ()) -> dict[str, Any]:
        if schema is None:
            content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
        else:
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
        for status in sorted({*_ALWAYS, *errors, *(("401",) if tokens else ())}):
            error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
            responses[status] = {"description": _ERRORS[status], "content": error}
            if status in ("429", "503"):
                responses[status]["headers"] = _RETRY
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if tokens:
            operation["security"] = [{"token": []}]
        return operation

    return made
