"""Where Python and torch keep in memory what a guard compares.

Each function gives words (an address, and what stands there) that differ as soon as an object is
changed. CPython does not promise where they are, so each kind is tried out at its first use: where
an object does not look as expected (another version of Python or torch) the function answers
``None``, and the values themselves are compared. Whoever keeps words keeps the object alive.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import torch

Word = tuple[int, int]

# Offsets in bytes in CPython 3.11 and 3.12, 64 bits. `_holds` and the trials below verify them.
_TYPE = 8
_TAG = 24
_LIST = (16, 24)
_CELL = 16
_SET = (16, 24, 32, 40)
_ENTRY_BYTES = 16
# torch counts references in the word before.
_COUNTS_END = 16
_DICT_OF_OBJECT = -24
_MANAGED_DICT = 1 << 4
_TENSOR, _HOOKS, _POST_HOOKS = 16, 24, 32
# Words of torch's structures that the trial looks at.
_MOST_WORDS = 32


def read(address: int) -> int:
    """The word that stands there."""
    return ctypes.c_uint64.from_address(address).value


def _words(addresses: Collection[int]) -> list[Word]:
    return [(address, read(address)) for address in addresses]


def type_words(value: Any) -> list[Word] | None:
    """Its class."""
    address = id(value) + _TYPE
    return _words([address]) if _has_cpython() and read(address) == id(type(value)) else None


def dict_words(value: dict[Any, Any]) -> list[Word] | None:
    """A dict's version, which each change of the dict makes another one."""
    return _words([id(value) + _TAG]) if _dicts_have_versions() else None


def attribute_words(value: Any) -> list[Word] | None:
    """The class of an object, which dict has its attributes, and that dict."""
    attributes = value.__dict__
    version, kind = dict_words(attributes), type_words(value)
    if version is None or kind is None:
        return None
    # The flag says that the interpreter keeps the dict before the object.
    places = [id(value) + _DICT_OF_OBJECT] if type(value).__flags__ & _MANAGED_DICT else []
    offset = type(value).__dictoffset__
    if offset > 0:
        places.insert(0, id(value) + offset)
    for place in places:
        if read(place) == id(attributes):
            return [*kind, (place, id(attributes)), *version]
    return None


def class_words(value: type) -> list[Word] | None:
    """A class's own attributes."""
    found = gc.get_referents(vars(value))
    if len(found) != 1 or type(found[0]) is not dict:
        return None
    return dict_words(found[0])


def slot_words(value: Any) -> list[Word] | None:
    """An object with ``__slots__`` and no ``__dict__``: all that it holds."""
    kind = type_words(value)
    if kind is None:
        return None
    size = type(value).__basicsize__
    return kind + _words(range(id(value) + 16, id(value) + size - 7, 8))


def list_words(value: list[Any]) -> list[Word] | None:
    """A list's length, where its items are, and the items."""
    if not _lists_are_known():
        return None
    head = _words([id(value) + offset for offset in _LIST])
    return head + _words([head[1][1] + 8 * i for i in range(len(value))])


def set_words(value: set[Any]) -> list[Word] | None:
    """A set's sizes, where its table is, and the keys in it."""
    if not _sets_are_known():
        return None
    head = _words([id(value) + offset for offset in _SET])
    mask, table = head[2][1], head[3][1]
    return head + _words([table + _ENTRY_BYTES * i for i in range(mask + 1)])


def array_words(value: Any) -> list[Word] | None:
    """The elements of a NumPy array."""
    if value.nbytes % 8 or not value.flags.c_contiguous:
        return None
    start = value.ctypes.data
    return _words(range(start, start + value.nbytes, 8))


def cell_words(value: types.CellType) -> list[Word] | None:
    """What a variable of a closure holds."""
    return _words([id(value) + _CELL]) if _cells_are_known() else None


def function_words(value: types.FunctionType) -> list[Word] | None:
    """A function's code and default values."""
    offsets = _function_offsets()
    return _words([id(value) + offset for offset in offsets]) if offsets else None


class Block(NamedTuple):
    """Memory that is looked at as long as the word at ``slot`` is ``owner``."""

    slot: int
    owner: int
    content: int
    words: int


def tensor_block(value: torch.Tensor) -> Block | None:
    """All that torch keeps of a tensor but counts of references: storage, sizes, strides, type."""
    owner, slot = value._cdata, id(value) + _TENSOR
    if _tensor_offsets() is None or read(slot) != owner:
        return None
    return Block(slot, owner, owner + _COUNTS_END, (_usable_bytes(owner) - _COUNTS_END) // 8)


def tensor_words(value: torch.Tensor) -> list[Word] | None:
    """Whether a tensor requires a gradient, its hooks, and its storage's memory.

    To be looked at while ``tensor_block`` is as it was.
    """
    offsets = _tensor_offsets()
    if offsets is None:
        return None
    try:
        storage = value.untyped_storage()
    except RuntimeError:  # A sparse tensor has none.
        return None
    in_storage = [storage._cdata + 8 * i for i in range(_usable_bytes(storage._cdata) // 8)]
    data = [address for address in in_storage if read(address) == storage.data_ptr()]
    if not data:
        return None
    autograd, flag = offsets
    words = _words([id(value) + _HOOKS, id(value) + _POST_HOOKS, data[0]])
    meta = read(value._cdata + autograd)
    return words + _words([meta + flag]) if meta else words


# ---- Trials ------------------------------------------------------------------------------------


@functools.cache
def _has_cpython() -> bool:
    """Whether objects begin as CPython's do: a count of references, the class."""
    if sys.implementation.name != "cpython" or sys.maxsize != 2**63 - 1:
        return False
    return object.__basicsize__ == 16 and list.__basicsize__ == 40


class _Plain:
    pass


@functools.cache
def _dicts_have_versions() -> bool:
    """Whether each way to change a dict changes its version, and reading it does not."""
    # Later versions have another use for this word.
    if not _has_cpython() or sys.version_info >= (3, 13):
        return False
    plain = _Plain()
    attributes = vars(plain)
    where: list[dict[Any, Any]] = [{}, attributes]

    def store(number: int) -> None:
        plain.value = number  # type: ignore[attr-defined]

    changes: list[Callable[[dict[Any, Any]], Any]] = [
        lambda d: d.update(a=1), lambda d: d.update(a=2), lambda d: d.setdefault("b", 3),
        lambda d: d.pop("a"), lambda d: d.update({5: 6}), lambda d: d.popitem(),
        lambda d: d.clear(), lambda d: d.__setitem__("c", 7), lambda d: d.__delitem__("c"),
    ]  # fmt: skip
    seen = []
    for each in where:
        seen.append(read(id(each) + _TAG))
        for change in changes:
            change(each)
            seen.append(read(id(each) + _TAG))
    for number in range(100):  # Until the interpreter has its fast way to store an attribute.
        store(number)
        seen.append(read(id(attributes) + _TAG))
    for number in range(3):
        _Plain.value = number  # type: ignore[attr-defined]
        (of_class,) = gc.get_referents(vars(_Plain))
        seen.append(read(id(of_class) + _TAG))
    del _Plain.value  # type: ignore[attr-defined]
    before = read(id(attributes) + _TAG)
    _ = attributes["value"], len(attributes), list(attributes.items()), plain.value  # type: ignore[attr-defined]
    return len(set(seen)) == len(seen) and read(id(attributes) + _TAG) == before


@functools.cache
def _lists_are_known() -> bool:
    if not _has_cpython():
        return False
    tried: list[Any] = [object() for _ in range(5)]
    size, items = (read(id(tried) + offset) for offset in _LIST)
    return size == 5 and all(read(items + 8 * i) == id(tried[i]) for i in range(5))


@functools.cache
def _sets_are_known() -> bool:
    if not _has_cpython() or set.__basicsize__ != 200:
        return False
    tried: set[Any] = {object() for _ in range(3)}
    fill, used, mask, table = (read(id(tried) + offset) for offset in _SET)
    if (fill, used, mask) != (3, 3, 7) or not 0 < table - id(tried) < set.__basicsize__:
        return False
    entries = {read(table + _ENTRY_BYTES * i) for i in range(8)}
    return entries == {0, *map(id, tried)}


@functools.cache
def _cells_are_known() -> bool:
    held = object()
    return _has_cpython() and read(id(cell := types.CellType(held)) + _CELL) == id(
        cell.cell_contents
    )


@functools.cache
def _function_offsets() -> tuple[int, ...] | None:
    """Of the code, the default values and those of arguments by keyword."""
    if not _has_cpython():
        return None

    def tried(a: int = 1, *, b: int = 2) -> int:
        return a + b

    held = [read(id(tried) + offset) for offset in range(0, types.FunctionType.__basicsize__, 8)]
    wanted = [id(tried.__code__), id(tried.__defaults__), id(tried.__kwdefaults__)]
    if any(held.count(word) != 1 for word in wanted):
        return None
    return tuple(8 * held.index(word) for word in wanted)


@functools.cache
def _tensor_offsets() -> tuple[int, int] | None:
    """Where a tensor has its pointer to what autograd keeps, and where that has the flag.

    Found by what ``requires_grad_`` changes in the memory of a tensor; ``None``: not found.
    """
    if not _has_cpython() or _size_of() is None:
        return None
    found = {_try_tensor(shape) for shape in ((), (3,), (2, 5))}
    return found.pop() if len(found) == 1 else None


@functools.cache
def _size_of() -> Callable[[int], int] | None:
    """The C library's ``malloc_usable_size``."""
    try:
        size_of = ctypes.CDLL(None).malloc_usable_size
    except AttributeError:
        return None
    size_of.argtypes, size_of.restype = [ctypes.c_void_p], ctypes.c_size_t
    return cast(Callable[[int], int], size_of)


def _usable_bytes(address: int) -> int:
    size_of = _size_of()
    return min(size_of(address), _MOST_WORDS * 8) if size_of else 0


def _try_tensor(shape: Sequence[int]) -> tuple[int, int] | None:
    def content(address: int) -> list[int]:
        return [read(address + 8 * i) for i in range(_usable_bytes(address) // 8)]

    def only_change(before: list[int], after: list[int]) -> int | None:
        changed = [i for i, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) == 2]
        return changed[0] if len(changed) == 1 else None

    with torch.inference_mode(False), torch.device("cpu"):
        tensor = torch.zeros(shape)
        if read(id(tensor) + _TENSOR) != tensor._cdata:
            return None
        plain = content(tensor._cdata)
        autograd = only_change(plain, content(tensor.requires_grad_(True)._cdata))
        if autograd is None or plain[autograd]:
            return None
        meta = read(tensor._cdata + 8 * autograd)
        on = content(meta)
        tensor.requires_grad_(False)
        frozen = content(meta)
        tensor.requires_grad_(True)
        flag = only_change(on, frozen)
        if flag is None or on[flag] ^ frozen[flag] != 1:
            return None
        if content(meta) != on:
            return None
        tensor.register_hook(lambda gradient: gradient)
        tensor.register_post_accumulate_grad_hook(lambda gradient: None)
        hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
        if [read(id(tensor) + o) for o in (_HOOKS, _POST_HOOKS)] != [id(h) for h in hooks]:
            return None
    return 8 * autograd, 8 * flag
