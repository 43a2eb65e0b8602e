"""``Record``: frozen values that become plain JSON types and come back."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Self


class Record:
    """``to_dict`` and ``from_dict`` of a frozen dataclass whose fields are plain or such again."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: tuples become lists."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """What ``to_dict`` wrote. Keys this version does not know are left out.

        Raises:
            TypeError: a key without a default is missing.
        """
        kinds = typing.get_type_hints(cls)
        values = {
            item.name: _typed(kinds[item.name], document[item.name])
            for item in dataclasses.fields(cls)  # type: ignore[arg-type]
            if item.name in document
        }
        return cls(**values)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _typed(kind: Any, value: Any) -> Any:
    """``value`` from JSON as the annotated type."""
    if value is None:
        return None
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        return _typed(kinds[0], value) if len(kinds) == 1 else value
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_dict(value)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_typed(inner[0], item) for item in value)
        return tuple(_typed(k, item) for k, item in zip(inner, value, strict=True))
    return value
