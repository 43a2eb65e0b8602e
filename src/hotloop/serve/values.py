"""One tensor: its shape, and its values from JSON or bytes; checked before an array is made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy

from ..infer import TensorSpec
from .limits import Limits
from .message import Refusal

_NUMBERS = {
    "b": (frozenset({bool}), "true or false"),
    "i": (frozenset({int}), "integers"),
    "u": (frozenset({int}), "integers"),
    "f": (frozenset({int, float}), "finite numbers"),
}


def array_of(data: Any, shape: Sequence[int], spec: TensorSpec) -> numpy.ndarray:
    """An array from JSON: a flat list in row-major order, or lists nested as the shape is.

    Raises:
        Refusal: another number of values, or values of another type or range.
    """
    dtype = numpy.dtype(spec.dtype)
    wanted = math.prod(shape)
    flat = data
    if not isinstance(flat, list):
        if shape:
            raise Refusal(400, f"data of input {spec.name} must be a list")
        flat = [flat]
    elif flat and isinstance(flat[0], list):
        for at, size in enumerate(shape):
            inner = at < len(shape) - 1
            if at == 0 and len(flat) != size:
                raise Refusal(400, f"data of input {spec.name} does not have the shape")
            if not inner:
                break
            if set(map(type, flat)) - {list} or set(map(len, flat)) - {shape[at + 1]}:
                raise Refusal(400, f"data of input {spec.name} does not have the shape")
            flat = list(itertools.chain.from_iterable(flat))
    if len(flat) != wanted:
        raise Refusal(400, f"data of input {spec.name} must have {wanted} values"[:300])
    allowed, what = _NUMBERS[dtype.kind]
    if set(map(type, flat)) - allowed:
        raise Refusal(400, f"data of input {spec.name} must be {what}")
    try:
        with numpy.errstate(over="ignore"):
            array = numpy.array(flat, dtype=dtype)
    except (OverflowError, ValueError):
        raise Refusal(400, f"a value of input {spec.name} is out of range") from None
    if dtype.kind == "f" and not numpy.isfinite(array).all():
        raise Refusal(400, f"a value of input {spec.name} is out of range")
    return array.reshape(shape)


def from_bytes(view: memoryview, shape: Sequence[int], spec: TensorSpec) -> numpy.ndarray:
    """An array on these bytes, which are as many as the shape needs; nothing is copied.

    Raises:
        Refusal: a boolean is neither 0 nor 1.
    """
    if spec.dtype == "bool":
        raw = numpy.frombuffer(view, dtype=numpy.uint8)
        # Any other byte in an array of booleans is undefined behaviour in the kernels.
        if raw.size and int(raw.max()) > 1:
            raise Refusal(400, f"bytes of input {spec.name} must be 0 or 1")
        return raw.view(numpy.bool_).reshape(shape)
    return numpy.frombuffer(view, dtype=spec.dtype).reshape(shape)


def shape_of(value: Any, spec: TensorSpec, limits: Limits) -> tuple[int, ...]:
    """A shape from JSON that fits the model's.

    Raises:
        Refusal: it does not, or needs more bytes than a body may have.
    """
    if not isinstance(value, list) or len(value) > limits.max_rank:
        raise Refusal(400, f"shape of input {spec.name} must be a list of sizes")
    if any(type(size) is not int or not 0 <= size < 2**31 for size in value):
        raise Refusal(400, f"sizes of input {spec.name} must be integers from 0 to 2147483647")
    fits = len(value) == len(spec.shape) and all(
        want is None or want == size for want, size in zip(spec.shape, value, strict=True)
    )
    if not fits:
        wanted = [-1 if size is None else size for size in spec.shape]
        raise Refusal(400, f"shape of input {spec.name} must be {wanted}"[:300])
    if 0 in value:
        raise Refusal(400, f"input {spec.name} must not be empty")
    if math.prod(value) * numpy.dtype(spec.dtype).itemsize > limits.max_body_bytes:
        raise Refusal(413, f"input {spec.name} has at most {limits.max_body_bytes} bytes")
    return tuple(value)


def nesting_of(value: Any, limits: Limits) -> list[int]:
    """The shape of nested lists, by the first of each; ``array_of`` checks the others.

    Raises:
        Refusal: a list is empty, or they nest too deep.
    """
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(shape) > limits.max_rank or not value:
            raise Refusal(400, "inputs must be nested lists of numbers, none of them empty")
        value = value[0]
    return shape
