"""A batch is a tree: a tensor, or tuples, lists, dicts and dataclasses of tensors and plain values.

``flatten`` takes the tensors out; what is left, the ``Structure``, is hashable, and says whether
two batches look alike. Named tuples, and mappings that are no ``dict`` (the ``BatchEncoding`` of
Transformers), keep their type.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from ..errors import ModelError


class Arguments:
    """Positional and named arguments of a model in one value.

    ``hotloop.Arguments(tokens, lengths, mask=mask)`` as ``x`` makes ``model(tokens, lengths,
    mask=mask)``. A model that takes a whole dict or list as one argument gets
    ``hotloop.Arguments(batch)``.
    """

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        parts = [repr(part) for part in self.args]
        parts += [f"{name}={part!r}" for name, part in self.kwargs.items()]
        return f"Arguments({', '.join(parts)})"


def call(model: Callable[..., Any], x: Any) -> Any:
    """What a model answers: ``model(x)``, ``model(*x)`` or ``model(**x)``.

    Args:
        x: a mapping is given by name; a tuple or list by place; ``Arguments`` as they say; anything
            else (a tensor, a dataclass, a ``PackedSequence``) as the one argument.
    """
    if isinstance(x, torch.Tensor):
        return model(x)
    args, kwargs = arguments(x)
    return model(*args, **kwargs)


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the named arguments that ``call`` gives a model for ``x``."""
    if isinstance(x, Arguments):
        return x.args, x.kwargs
    if isinstance(x, Mapping):
        return (), dict(x)
    if isinstance(x, tuple | list) and not isinstance(x, PackedSequence):
        return tuple(x), {}
    return (x,), {}


_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class _Same:
    """A value whose equality says nothing of its contents: alike only with itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclass(frozen=True, slots=True)
class Structure:
    """What a tree is beside its tensors. Two that are equal take each other's tensors.

    Attributes:
        kind: type of the value at this place; ``None``: a tensor.
        names: keys or fields of the parts; empty where they are told apart by place.
        parts: the places below.
        value: of a leaf that is no tensor.
        like: of a leaf the value; of a type of its own an object without parts, to make others
            from. It holds no tensor, so that a structure may be kept.
    """

    kind: type | None
    names: tuple[Hashable, ...] = ()
    parts: tuple[Structure, ...] = ()
    value: Hashable = None
    like: Any = field(default=None, compare=False, repr=False)

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The tree of these tensors, in the order in which ``flatten`` gave them."""
        return self._build(iter(tensors))

    def _build(self, tensors: Iterator[torch.Tensor]) -> Any:
        if self.kind is None:
            return next(tensors)
        if not self.parts:
            return self.like
        parts = [part._build(tensors) for part in self.parts]
        if self.kind in (tuple, list):
            return self.kind(parts)
        if self.kind is dict:
            return dict(zip(self.names, parts, strict=True))
        if issubclass(self.kind, tuple):  # A named tuple.
            return self.kind(*parts)
        if self.kind is Arguments:
            count = len(parts) - len(self.names)
            names = [str(name) for name in self.names]
            return Arguments(*parts[:count], **dict(zip(names, parts[count:], strict=True)))
        return _with_parts(self.like, self.names, parts)


_TENSOR = Structure(None)


def _with_parts(like: Any, names: Sequence[Hashable], parts: Sequence[Any]) -> Any:
    """A copy of a mapping or dataclass with other values."""
    made = copy.copy(like)
    for name, part in zip(names, parts, strict=True):
        if isinstance(made, MutableMapping):
            made[name] = part
        else:
            object.__setattr__(made, str(name), part)  # A frozen dataclass too.
    return made


def flatten(tree: Any) -> tuple[list[torch.Tensor], Structure]:
    """The tensors of a tree, in order, and its structure."""
    tensors: list[torch.Tensor] = []
    return tensors, _take_apart(tree, tensors)


def _take_apart(value: Any, tensors: list[torch.Tensor]) -> Structure:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _TENSOR
    kind = type(value)
    if kind is PackedSequence:
        return _take_packed_apart(value, tensors)
    if kind in _PLAIN:
        # With its type: 1 == True, and 0.0 == -0.0 is told apart by its text.
        return Structure(kind, value=repr(value) if kind in (float, complex) else value, like=value)
    names, parts = _parts_of(value)
    if parts is None:
        return Structure(kind, value=_Same(value), like=value)
    below = tuple([_take_apart(part, tensors) for part in parts])
    if not below:
        return Structure(kind, like=value)
    if kind is dict or kind is Arguments or isinstance(value, tuple | list):
        return Structure(kind, names, below)
    return Structure(kind, names, below, like=_with_parts(value, names, [None] * len(below)))


def _take_packed_apart(value: PackedSequence, tensors: list[torch.Tensor]) -> Structure:
    """How many sequences go on at each step decides which operations follow: no data, but form."""
    data, sizes, *order = value
    form = Structure(torch.Tensor, value=tuple(sizes.tolist()), like=sizes)
    parts = [_take_apart(data, tensors), form, *(_take_apart(part, tensors) for part in order)]
    return Structure(PackedSequence, parts=tuple(parts))


def _parts_of(value: Any) -> tuple[tuple[Hashable, ...], Sequence[Any] | None]:
    """Names and parts of a value that has any; ``None``: it is a leaf."""
    if isinstance(value, Arguments):
        return tuple(value.kwargs), [*value.args, *value.kwargs.values()]
    if isinstance(value, Mapping):
        changeable = isinstance(value, MutableMapping)
        return (tuple(value), list(value.values())) if changeable else ((), None)
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return (), value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value))
        return names, [getattr(value, name) for name in names]
    return (), None


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """The tree with each tensor changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    tensors, structure = flatten(tree)
    return structure.unflatten([change(tensor) for tensor in tensors])


def named_tensors(tree: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a tree in the order of ``flatten``, each with its place: ``y[0].boxes``."""
    tensors, structure = flatten(tree)
    names = [place for place, leaf in _leaves(structure, name) if leaf.kind is None]
    return list(zip(names, tensors, strict=True))


def opaque_names(tree: Any, name: str) -> list[str]:
    """What each value is called that is neither tensor nor plain: it may change and look alike."""
    leaves = _leaves(flatten(tree)[1], name)
    return [place for place, leaf in leaves if isinstance(leaf.value, _Same)]


def _leaves(structure: Structure, name: str) -> Iterator[tuple[str, Structure]]:
    kind = structure.kind
    if kind is None or not structure.parts:
        yield name, structure
        return
    by_place = len(structure.parts) - len(structure.names)
    for place, part in enumerate(structure.parts):
        key = structure.names[place - by_place] if place >= by_place else None
        if kind is Arguments:
            its_name = str(place if key is None else key)
        elif key is None:
            fields = getattr(kind, "_fields", None)
            its_name = f"{name}[{place}]" if fields is None else f"{name}.{fields[place]}"
        else:
            its_name = f"{name}.{key}"
        yield from _leaves(part, its_name)


def num_samples(*trees: Any) -> int | None:
    """The first size that all tensors have alike, scalars left out; ``None``: there is none."""
    sizes = {t.shape[0] for tree in trees for t in flatten(tree)[0] if t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def part_sizes(count: int, rows: int) -> list[int]:
    """Samples of the parts of a batch of ``count`` that is cut into parts of ``rows``.

    The last may have fewer, but not one alone where that can be had: a batch norm needs two.
    """
    sizes = [rows] * (count // rows) + [count % rows] * (count % rows > 0)
    if len(sizes) > 1 and sizes[-1] == 1 and rows > 2:
        sizes[-2:] = [rows - 1, 2]
    return sizes


def split(trees: Sequence[Any], rows: int) -> Iterator[tuple[Any, ...]]:
    """Cut trees of one batch into parts of ``rows`` samples at most, see ``part_sizes``.

    Scalars and plain values go into each part as they are.

    Raises:
        ModelError: the tensors do not have one first size.
    """
    count = num_samples(*trees)
    if count is None:
        sizes = sorted({tuple(t.shape) for tree in trees for t in flatten(tree)[0]})
        raise ModelError(
            "a batch that is cut into micro-batches needs the samples in the first dimension of "
            "every tensor",
            got=f"shapes {', '.join(map(str, sizes)) or 'none'}",
            next_step="leave micro_batch_size out, or keep what is no sample in the model",
        )
    begin = 0
    for length in part_sizes(count, rows):

        def part(tensor: torch.Tensor, begin: int = begin, length: int = length) -> torch.Tensor:
            return tensor.narrow(0, begin, length) if tensor.dim() > 0 else tensor

        yield tuple(map_tensors(part, tree) for tree in trees)
        begin += length
