"""JSON from a client: bounded in depth and in values before anything is made of it."""

from __future__ import annotations

from typing import Any

import orjson

from .message import Refusal

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # RFC 8259 lets a reader skip it; PowerShell writes it.
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def parse_json(body: bytes | bytearray | memoryview, *, max_depth: int, max_values: int) -> Any:
    """The value that ``body`` holds, by RFC 8259: NaN and infinities are not JSON.

    A value takes up to 60 bytes of memory where two bytes were sent, and nesting takes stack, so
    both are counted first. Brackets and commas inside strings count too, which only refuses more.

    Raises:
        Refusal: 400, with the place where it stops being JSON; 413 for too many values.
    """
    body = bytes(body).removeprefix(_BYTE_ORDER_MARK)
    values = body.count(b",") + body.count(b"[") + body.count(b"{") + 1
    if values > max_values:
        raise Refusal(413, f"the JSON has more than {max_values} values", reason="json values")
    if depth_exceeds(body, max_depth):
        raise Refusal(400, f"the JSON is nested deeper than {max_depth}, or brackets are unpaired")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refusal(
            400, f"the body is not JSON: line {error.lineno} column {error.colno}"
        ) from None


def depth_exceeds(body: bytes, max_depth: int) -> bool:
    """Whether brackets nest deeper than ``max_depth`` (or do not pair); linear time, no recursion.

    Each round takes the innermost pairs away, so as many rounds as levels empty the text.
    """
    brackets = body.translate(_ONE_KIND, _NOT_BRACKETS)
    for _ in range(max_depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)
