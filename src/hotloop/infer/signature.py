"""Arguments and results as flat lists of arrays, and back. Imports no torch.

A structure is plain JSON: ``"*"`` one array, ``null`` None, ``{"tuple": [...]}``,
``{"list": [...]}``, ``{"dict": {...}}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ModelError

LEAF = "*"


def flatten(value: Any, what: str) -> tuple[list[Any], Any]:
    """The arrays (or tensors) in a value, in order, and its structure.

    Raises:
        ModelError: something else than arrays in tuples, lists, dicts of text and ``None``.
    """
    leaves: list[Any] = []
    return leaves, _structure(value, leaves, what)


def _structure(value: Any, leaves: list[Any], what: str) -> Any:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        leaves.append(value)
        return LEAF
    if value is None:
        return None
    if type(value) in (tuple, list):
        return {type(value).__name__: [_structure(part, leaves, what) for part in value]}
    # A model's own kind of mapping would come back as a dict: not what eager gives.
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _structure(part, leaves, what) for key, part in value.items()}}
    raise ModelError(
        f"{what} must be tensors in tuples, lists or dicts",
        got=f"{type(value).__module__}.{type(value).__qualname__}",
        next_step="wrap the model in a module whose forward takes and gives those",
    )


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """The value again, with other arrays in it."""
    return _value(structure, iter(leaves))


def _value(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure == LEAF:
        return next(leaves)
    if structure is None:
        return None
    ((kind, parts),) = structure.items()
    if kind == "dict":
        return {key: _value(part, leaves) for key, part in parts.items()}
    values = [_value(part, leaves) for part in parts]
    return tuple(values) if kind == "tuple" else values


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments of the model.

    A tuple or list holds the positional ones, a dict those by name; all else is the only one.
    """
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, dict):
        return (), dict(example)
    return (example,), {}
