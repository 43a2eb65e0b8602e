"""Nested training state as flat tensors and a JSON document, and back, without pickle.

``optimizer.state_dict()`` and ``lr_scheduler.state_dict()`` are dicts with integer keys, tuples,
counters, infinities and tensors; JSON knows none of these. Each gets a tag:

    null, true, 1, "text", 0.5      themselves
    [...]                           a list
    {"tag": ...}                    anything else, for example {"tuple": [1, 2]},
                                    {"dict": [[key, value], ...]}, {"tensor": "state.0.exp_avg"}

A JSON object is therefore always a tag with one value and never a dict as it is.
"""

from __future__ import annotations

import json
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError

MAX_DEPTH = 64

_MAPPINGS: dict[str, type[dict[Any, Any]]] = {
    "dict": dict, "OrderedDict": OrderedDict, "Counter": Counter,
}  # fmt: skip
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "torch.Size": torch.Size,
}  # fmt: skip
_NAMES = {kind: name for name, kind in [*_MAPPINGS.items(), *_SEQUENCES.items()]}
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
_COMPRESSED_NAMES = {str(layout): layout for layout in _COMPRESSED}
# Written as pairs of real numbers: safetensors has no such type.
_AS_PAIRS = (torch.complex128,)
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_MALFORMED = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
# JSON readers of other languages keep integers to 64 bits; Python's own refuses past 4,300 digits.
_MAX_PLAIN_INT = 2**63


def split_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors by their path in the state, and the rest as a JSON-able document.

    Types are kept exactly: None, bool, int, float (infinities, NaN with its bits, minus zero), str,
    bytes, list, tuple, set, frozenset, dict (any encodable key, order kept), OrderedDict, Counter,
    torch.Size, torch.dtype, torch.device, Tensor (sparse ones too), NumPy numbers and arrays. Two
    paths that hold one dense tensor object hold one again after ``join_state``. A Parameter, or a
    tensor that requires a gradient, comes back as a plain detached tensor.

    Nothing is copied: the tensors are those of the state, detached; arrays share memory too.

    Raises:
        CheckpointError: something else is in there, or it contains itself; names path and type.
    """
    writer = _Writer()
    return writer.tensors, writer.encode(state, "")


def join_state(tensors: dict[str, torch.Tensor], document: Any) -> Any:
    """The state that ``split_state`` took apart; tensors are used as they are, not copied.

    Raises:
        CheckpointError: the document is not one of ``split_state``, or a tensor is missing.
    """
    try:
        return _decode(tensors, document)
    except CheckpointError:
        raise
    except (*_MALFORMED, struct.error) as error:
        raise CheckpointError(
            "a state document must be what split_state made", got=f"{type(error).__name__}: {error}"
        ) from None


class _Writer:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._keep_alive: list[object] = []
        self._open: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if abs(value) < _MAX_PLAIN_INT else {"int": hex(value)}
        if kind is float:
            finite = value - value == 0.0
            return value if finite else {"float": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is torch.dtype:
            return {"torch.dtype": str(value)}
        if kind is torch.device:
            return {"torch.device": str(value)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return {"numpy": [value.dtype.str, value.tobytes().hex()]}
        if kind is np.ndarray:
            return self._array(value, path)
        return self._container(value, path)

    def _tensor(self, value: torch.Tensor, path: str) -> Any:
        """A dense tensor by its name; a sparse one as the dense tensors it consists of."""
        if value.layout == torch.strided and value.dtype in _AS_PAIRS and not value.is_meta:
            pairs = torch.view_as_real(value.detach().resolve_conj())
            return {str(value.dtype): self._add(value, pairs, path)}
        if value.layout == torch.strided:
            return {"tensor": self._add(value, value.detach(), path)}
        value = value.detach()
        if value.layout == torch.sparse_coo:
            parts = [value._indices(), value._values()]
            plain: list[Any] = [value.is_coalesced()]
        elif value.layout in _COMPRESSED:
            names = _COMPRESSED[value.layout]
            parts, plain = [getattr(value, name)() for name in names], []
        else:
            return {"tensor": self._add(value, value, path)}  # Refused where it is written.
        encoded = [self.encode(part, _below(path, place)) for place, part in enumerate(parts)]
        return {str(value.layout): [*encoded, list(value.shape), *plain]}

    def _container(self, value: Any, path: str) -> Any:
        kind = type(value)
        if kind is not list and kind not in _NAMES:
            name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            raise CheckpointError(
                "a checkpoint can hold plain Python values and tensors",
                got=f"{name} at {path or 'the top'}",
                next_step="leave it out of the state, or turn it into numbers, texts or tensors",
            )
        if id(value) in self._open or len(self._open) >= MAX_DEPTH:
            rule = "contain itself" if id(value) in self._open else f"nest over {MAX_DEPTH} levels"
            raise CheckpointError(f"the state of a checkpoint must not {rule}", got=f"at {path}")
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return {_NAMES[kind]: [self._pair(k, v, path) for k, v in value.items()]}
            items = [self.encode(each, _below(path, index)) for index, each in enumerate(value)]
            if isinstance(value, set | frozenset):
                items.sort(key=json.dumps)  # equal sets give equal documents, whatever their order
            return items if kind is list else {_NAMES[kind]: items}
        finally:
            self._open.discard(id(value))

    def _pair(self, key: Any, value: Any, path: str) -> list[Any]:
        below = _below(path, key)
        return [self.encode(key, f"the key {below}"), self.encode(value, below)]

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        try:
            tensor = torch.from_numpy(np.require(value, requirements=["C", "W"]))
        except (TypeError, ValueError):
            raise CheckpointError(
                "an array in a checkpoint must have a dtype that torch knows",
                got=f"{value.dtype} at {path or 'the top'}",
            ) from None
        return {"numpy.ndarray": self._add(value, tensor.reshape(value.shape), path)}

    def _add(self, value: object, tensor: torch.Tensor, path: str) -> str:
        """The name of a tensor, a new one unless this very object has one."""
        name = self._names.get(id(value))
        if name is None:
            # safetensors keeps the name __metadata__ for itself.
            base = name = "state" + path if path in ("", "__metadata__") else path
            count = 1
            while name in self.tensors:  # {1: a, "1": b} have the same path
                count += 1
                name = f"{base}#{count}"
            self._names[id(value)] = name
            # An id may be used again once its object is gone.
            self._keep_alive.append(value)
            self.tensors[name] = tensor
        return name


def _below(path: str, key: object) -> str:
    text = key if isinstance(key, str) else repr(key)
    # A lone surrogate is a text in Python but no Unicode, which safetensors wants for names.
    text = text.encode("utf-8", "backslashreplace").decode()
    return f"{path}.{text}" if path else text


def _decode(tensors: dict[str, torch.Tensor], node: Any) -> Any:
    if isinstance(node, list):
        return [_decode(tensors, each) for each in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1:
        raise CheckpointError("a tag has one value", got=sorted(node))
    ((tag, value),) = node.items()
    if tag in _MAPPINGS:
        return _mapping(_MAPPINGS[tag], [_decode(tensors, pair) for pair in value])
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](_decode(tensors, list(value)))
    if tag in ("tensor", "numpy.ndarray"):
        if value not in tensors:
            raise CheckpointError("every tensor of the state must be there", got=f"no {value!r}")
        return tensors[value] if tag == "tensor" else tensors[value].numpy()
    if tag in _COMPRESSED_NAMES or tag == str(torch.sparse_coo):
        return _sparse(tag, [_decode(tensors, part) for part in value])
    if tag in map(str, _AS_PAIRS):
        return torch.view_as_complex(tensors[value])
    if tag == "int":
        return int(value, 16)
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if tag == "bytes":
        return bytes.fromhex(value)
    if tag == "torch.dtype":
        return _DTYPES[value]
    if tag == "torch.device":
        return torch.device(value)
    if tag == "numpy":
        return np.frombuffer(bytes.fromhex(value[1]), np.dtype(value[0]))[0]
    raise CheckpointError("a state document has an unknown tag", got=tag)


def _sparse(tag: str, parts: list[Any]) -> torch.Tensor:
    if tag in _COMPRESSED_NAMES:
        layout = _COMPRESSED_NAMES[tag]
        return torch.sparse_compressed_tensor(*parts, layout=layout, check_invariants=True)
    indices, values, size, coalesced = parts
    return torch.sparse_coo_tensor(
        indices, values, size, is_coalesced=coalesced, check_invariants=True
    )


def _mapping(kind: type[dict[Any, Any]], pairs: list[Any]) -> dict[Any, Any]:
    made = kind()
    for key, value in pairs:
        made[key] = value
    return made
