"""The page at ``/`` to try the model, and the one that describes the interface."""

from __future__ import annotations

import html
import importlib.resources
import json
from typing import Any

_FILES = {
    "/": ("page.html", b"text/html; charset=utf-8"),
    "/page.css": ("page.css", b"text/css; charset=utf-8"),
    "/page.js": ("page.js", b"text/javascript; charset=utf-8"),
    "/tensor.js": ("tensor.js", b"text/javascript; charset=utf-8"),
}


def assets() -> dict[bytes, tuple[bytes, bytes]]:
    """Content type and body of each file, by path; none of them knows the model."""
    folder = importlib.resources.files(__name__)
    return {
        path.encode(): (kind, folder.joinpath(name).read_bytes())
        for path, (name, kind) in _FILES.items()
    }


def docs_page(document: dict[str, Any]) -> bytes:
    """The interface for reading, made from the OpenAPI document."""
    escape = html.escape
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            rows = "".join(
                f"<tr><td>{escape(status)}</td><td>{escape(found['description'])}</td></tr>"
                for status, found in operation["responses"].items()
            )
            more = escape(operation.get("description", ""))
            parts.append(
                f"<details><summary><code><b>{method.upper()}</b> {escape(path)}</code> "
                f"{escape(operation['summary'])}</summary><p>{more}</p>"
                f"<table>{rows}</table></details>"
            )
    schemas = "".join(
        f"<details><summary><code>{escape(name)}</code></summary>"
        f"<pre>{escape(json.dumps(schema, indent=2))}</pre></details>"
        for name, schema in document["components"]["schemas"].items()
    )
    title = escape(document["info"]["title"])
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><link rel='stylesheet' href='/page.css'>"
        "<link rel='icon' href='data:,'></head><body><main>"
        f"<h1>{title}</h1><p>{escape(document['info']['description'])} "
        "<a href='/openapi.json'>openapi.json</a>, <a href='/'>try the model</a></p>"
        f"<section><h2>Paths</h2>{''.join(parts)}</section>"
        f"<section><h2>Schemas</h2>{schemas}</section></main></body></html>"
    ).encode()
