"""Arguments and results as flat lists of arrays, and back. Imports no torch.

A structure is plain JSON: ``"*"`` one array, ``null`` None, ``{"int": 3}`` a plain value,
``{"tuple": [...]}``, ``{"list": [...]}``, ``{"dict": {...}}``. Beside it, in this process alone:
``Typed`` (a dataclass, a named tuple, a mapping of a type of its own) and ``Opaque`` (any other
object in a result).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError
from .engine import TensorSpec

LEAF = "*"
_ONE_ARGUMENT = {"tuple": [{"tuple": [LEAF]}, {"dict": {}}]}
_PLAIN = {"bool": bool, "int": int, "float": float, "str": str}


@dataclass(frozen=True, slots=True)
class Typed:
    """A named tuple, a dataclass, or a mapping that is no ``dict`` of text.

    Attributes:
        kind: its type. names: keys or fields; none of a named tuple.
        parts: structures below.
        like: one without arrays, to make others from.
    """

    kind: type
    names: tuple[Any, ...]
    parts: tuple[Any, ...]
    like: Any = field(compare=False, repr=False)

    def made_of(self, values: Sequence[Any]) -> Any:
        """A value of this type."""
        if not self.names:
            return self.kind(*values)
        return _with_parts(self.like, self.names, values)


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """An object in a result that nothing is known of."""

    value: Any


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        input_structure, output_structure: inputs are ``(args, kwargs)``.
        inputs, outputs: ``None`` as first size where the batch goes.
        only_eager: why no engine but the module itself gives its answers; ``None``: any may.
    """

    input_structure: Any
    output_structure: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    only_eager: str | None = None

    @property
    def takes_one(self) -> bool:
        """Whether one positional argument is all that goes in."""
        return bool(self.input_structure == _ONE_ARGUMENT)

    def call(self, model: Callable[..., Any], leaves: Sequence[Any]) -> list[Any]:
        """The model's result as a flat list, for flat inputs."""
        args, kwargs = unflatten(self.input_structure, leaves)
        return flatten(model(*args, **kwargs), "the result", opaque=True)[0]

    def leaves_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The arrays of a call; ``None``: they are not arranged as in the example.

        One argument may be the whole tree, as a train step takes it.
        """
        given = [(args, kwargs)]
        if len(args) == 1 and not kwargs:
            given.append(arguments(args[0]))
        for arranged in given:
            with contextlib.suppress(ModelError):
                leaves, structure = flatten(arranged, "the input")
                if self._is_input(structure):
                    return leaves
        return None

    def _is_input(self, structure: Any) -> bool:
        if structure == self.input_structure:
            return True
        return bool(plain(structure) == plain(self.input_structure))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types.

        Raises:
            ModelError: what only the module itself answers cannot be written.
        """
        if self.only_eager is not None:
            raise ModelError(
                "a model that is kept in a file must be one that engines can run",
                got=self.only_eager,
            )
        specs = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            **{name: [spec.to_dict() for spec in found] for name, found in specs.items()},
            "input_structure": plain(self.input_structure),
            "output_structure": plain(self.output_structure),
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Signature:
        """What ``to_dict`` gave."""
        inputs, outputs = (
            tuple(map(TensorSpec.from_dict, document[name])) for name in ("inputs", "outputs")
        )
        return cls(document["input_structure"], document["output_structure"], inputs, outputs)


def flatten(value: Any, what: str, *, opaque: bool = False) -> tuple[list[Any], Any]:
    """The arrays (or tensors) in a value, in order, and its structure.

    Args:
        opaque: keep any other object as it is.

    Raises:
        ModelError: something else than arrays and plain values in tuples, lists, mappings and
            dataclasses.
    """
    leaves: list[Any] = []
    return leaves, _structure(value, leaves, what, opaque)


def _structure(value: Any, leaves: list[Any], what: str, opaque: bool) -> Any:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        leaves.append(value)
        return LEAF
    kind = type(value)
    if value is None:
        return None
    if kind in _PLAIN.values():
        return {kind.__name__: value}
    if kind in (tuple, list):
        return {kind.__name__: [_structure(part, leaves, what, opaque) for part in value]}
    if kind is dict and all(isinstance(key, str) for key in value):
        parts = {key: _structure(part, leaves, what, opaque) for key, part in value.items()}
        return {"dict": parts}
    found = _parts_of(value)
    if found is not None:
        names, values = found
        below = tuple(_structure(part, leaves, what, opaque) for part in values)
        like = _with_parts(value, names, [None] * len(names)) if names else None
        return Typed(kind, names, below, like)
    if opaque:
        return Opaque(value)
    raise ModelError(
        f"{what} must be tensors in tuples, lists, dicts or dataclasses",
        got=f"{kind.__module__}.{kind.__qualname__}",
        next_step="wrap the model in a module whose forward takes and gives those",
    )


def _parts_of(value: Any) -> tuple[tuple[Any, ...], list[Any]] | None:
    """Names and parts of a value of a type of its own; ``None``: it has none."""
    if isinstance(value, MutableMapping):
        return (tuple(value), list(value.values())) if value else None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return (), list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value))
        return (names, [getattr(value, name) for name in names]) if names else None
    return None


def _with_parts(like: Any, names: Sequence[Any], parts: Sequence[Any]) -> Any:
    made = copy.copy(like)
    for name, part in zip(names, parts, strict=True):
        if isinstance(made, MutableMapping):
            made[name] = part
        else:
            object.__setattr__(made, name, part)  # A frozen dataclass too.
    return made


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """The value again, with other arrays in it."""
    return _value(structure, iter(leaves))


def _value(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure == LEAF:
        return next(leaves)
    if structure is None:
        return None
    if isinstance(structure, Opaque):
        return structure.value
    if isinstance(structure, Typed):
        return structure.made_of([_value(part, leaves) for part in structure.parts])
    ((kind, parts),) = structure.items()
    if kind in _PLAIN:
        return parts
    if kind == "dict":
        return {key: _value(part, leaves) for key, part in parts.items()}
    values = [_value(part, leaves) for part in parts]
    return tuple(values) if kind == "tuple" else values


def plain(structure: Any) -> Any:
    """As JSON: dicts and tuples for what has a type of its own, which no file can name safely.

    Raises:
        ModelError: a mapping whose keys are no text.
    """
    if isinstance(structure, Typed):
        parts = [plain(part) for part in structure.parts]
        if not structure.names:
            return {"tuple": parts}
        if not all(isinstance(name, str) for name in structure.names):
            raise ModelError("a mapping must have text as keys", got=structure.names)
        return {"dict": dict(zip(structure.names, parts, strict=True))}
    if not isinstance(structure, dict):
        return structure
    ((kind, parts),) = structure.items()
    if kind in _PLAIN:
        return structure
    if kind == "dict":
        return {"dict": {key: plain(part) for key, part in parts.items()}}
    return {kind: [plain(part) for part in parts]}


def without_values(structure: Any) -> Any:
    """A plain structure with ``None`` in the place of plain values."""
    if not isinstance(structure, dict):
        return structure
    ((kind, parts),) = structure.items()
    if kind in _PLAIN:
        return None
    if kind == "dict":
        return {"dict": {key: without_values(part) for key, part in parts.items()}}
    return {kind: [without_values(part) for part in parts]}


def not_of_arrays(structure: Any) -> str | None:
    """What a result has in it that no engine gives: a plain value, an object; ``None``: nothing."""
    if isinstance(structure, Opaque):
        kind = type(structure.value)
        return f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(structure, Typed):
        parts: Any = structure.parts
    elif isinstance(structure, dict):
        ((kind_name, parts),) = structure.items()
        if kind_name in _PLAIN:
            return str(kind_name)
        parts = parts.values() if kind_name == "dict" else parts
    else:
        return None
    return next((found for part in parts if (found := not_of_arrays(part))), None)


def leaf_names(structure: Any, name: str) -> list[str]:
    """A name for each array: keys and fields behind dots, places behind ``_``."""
    if structure == LEAF:
        return [name]
    if isinstance(structure, Typed):
        keys = structure.names or structure.kind._fields  # type: ignore[attr-defined]
        structure = {"dict": dict(zip(map(str, keys), structure.parts, strict=True))}
    if not isinstance(structure, dict):
        return []
    ((kind, parts),) = structure.items()
    if kind in _PLAIN:
        return []
    if kind == "dict":
        below = [(f"{name}.{key}" if name else key, part) for key, part in parts.items()]
    else:
        below = [(f"{name}_{place}", part) for place, part in enumerate(parts)]
    return [found for place, part in below for found in leaf_names(part, place)]


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments of the model.

    A tuple or list holds the positional ones, a mapping those by name, ``hotloop.Arguments`` both;
    all else is the only one.
    """
    if sys.modules.get("torch") is not None:  # Else nobody has ``Arguments``, ``PackedSequence``.
        from ..memory.tree import arguments as of_tree

        return of_tree(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example,), {}
