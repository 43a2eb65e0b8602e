"""Arguments and results as flat lists of arrays, and back. Imports no torch.

A structure is plain JSON: ``"*"`` one array, ``null`` None, ``{"tuple": [...]}``,
``{"list": [...]}``, ``{"dict": {...}}``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError
from .engine import TensorSpec

LEAF = "*"
_ONE_ARGUMENT = {"tuple": [{"tuple": [LEAF]}, {"dict": {}}]}


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        input_structure, output_structure: inputs are ``(args, kwargs)``.
        inputs, outputs: ``None`` as first size where the batch goes.
    """

    input_structure: Any
    output_structure: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def takes_one(self) -> bool:
        """Whether one positional argument is all that goes in."""
        return bool(self.input_structure == _ONE_ARGUMENT)

    def call(self, model: Callable[..., Any], leaves: Sequence[Any]) -> list[Any]:
        """The model's result as a flat list, for flat inputs."""
        args, kwargs = unflatten(self.input_structure, leaves)
        return flatten(model(*args, **kwargs), "the result")[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        specs = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            **{name: [spec.to_dict() for spec in found] for name, found in specs.items()},
            "input_structure": self.input_structure,
            "output_structure": self.output_structure,
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Signature:
        """What ``to_dict`` gave."""
        inputs, outputs = (
            tuple(map(TensorSpec.from_dict, document[name])) for name in ("inputs", "outputs")
        )
        return cls(document["input_structure"], document["output_structure"], inputs, outputs)


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
