"""What a dry run must leave alone: the Python state that a model, a loss and their code reach.

Tensors are fake in a dry run; all else that a forward pass changes is real: attributes, lists and
dicts, closures, globals, attributes of classes, caches of functions, random numbers. ``preserved``
notes them before and puts them back.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import itertools
import logging
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_MISSING: Any = object()
_ITERATORS = (itertools.count, itertools.cycle)
# Packages whose code is not followed; their objects change nothing of the user's.
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "hotloop"}
# Objects that are looked at, and elements of one container that are followed.
_MOST_OBJECTS = 50_000
_MOST_ELEMENTS = 10_000
_MOST_ARRAY_BYTES = 64 << 20


@contextlib.contextmanager
def preserved(*roots: Any) -> Iterator[None]:
    """Put back, at the end, what is reached from ``roots`` and from what their code names.

    Attributes of objects, the contents of containers, variables of closures, globals, attributes of
    classes, NumPy arrays, gradients, random numbers (torch's, NumPy's, Python's; those of CUDA
    devices excepted). Caches of ``functools`` that the dry run filled are emptied.
    """
    kept = _Kept()
    for root in roots:
        kept.add(root)
    kept.follow()
    kept.random_numbers()
    # torch logs a traceback of each operation that shapes do not fit; who asks tells it in a line.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled
        for restore in reversed(kept.restores):
            with contextlib.suppress(Exception):  # What refuses must not keep the others.
                restore()


class _Kept:
    """Breadth first from the roots; each thing that can change leaves a function to restore it."""

    def __init__(self) -> None:
        self.restores: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # Kept alive, so that an id stays its own.
        self._queue: collections.deque[Any] = collections.deque()
        self._named: dict[int, set[str]] = collections.defaultdict(set)

    def add(self, value: Any) -> None:
        """Look at a value later, if it was not met before."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return
        if id(value) not in self._seen and len(self._seen) < _MOST_OBJECTS:
            self._seen[id(value)] = value
            self._queue.append(value)

    def follow(self) -> None:
        """Until nothing new is reached."""
        while self._queue:
            self._visit(self._queue.popleft())

    def _visit(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._gradient(value)
        elif isinstance(value, dict | list | set | collections.deque | tuple | frozenset):
            self._container(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            self._all(value.func, value.args, value.keywords)
        elif isinstance(value, property):
            self._all(value.fget, value.fset)
        elif isinstance(value, staticmethod | classmethod):
            self.add(value.__func__)
        elif isinstance(value, functools.cached_property):
            self.add(value.func)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._cache(value)
        elif isinstance(value, type):
            self._class(value)
        elif not isinstance(value, types.ModuleType) and not self._numbers(value):
            self._object(value)

    def _all(self, *values: Any) -> None:
        for value in values:
            self.add(value)

    # ---- Values ------------------------------------------------------------------------------

    def _gradient(self, tensor: torch.Tensor) -> None:
        if not (tensor.is_leaf and tensor.requires_grad):
            return
        before = tensor.grad

        def restore() -> None:
            if tensor.grad is not before:
                tensor.grad = before

        self.restores.append(restore)

    def _container(self, value: Any) -> None:
        elements = list(value.values()) if isinstance(value, dict) else value
        if len(value) <= _MOST_ELEMENTS:
            self._all(*elements)
        if isinstance(value, dict):
            self._mapping(value)
        elif isinstance(value, list | collections.deque):
            self._sequence(value)
        elif isinstance(value, set):
            members = set(value)

            def restore() -> None:
                if value != members:
                    value.clear()
                    value.update(members)

            self.restores.append(restore)

    def _sequence(self, value: Any) -> None:
        before = [_twin(element) for element in value]

        def restore() -> None:
            same = len(value) == len(before)
            if not same or any(a is not b for a, b in zip(value, before, strict=True)):
                value.clear()
                value.extend(before)

        self.restores.append(restore)

    def _mapping(self, value: dict[Any, Any]) -> None:
        before = [(key, _twin(element)) for key, element in value.items()]
        # Past what a class of its own makes of an assignment.
        kind: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict

        def restore() -> None:
            now = list(kind.items(value))
            if len(now) == len(before) and all(
                a is c and b is d for (a, b), (c, d) in zip(now, before, strict=True)
            ):
                return
            kind.clear(value)
            for key, element in before:
                kind.__setitem__(value, key, element)

        self.restores.append(restore)

    def _numbers(self, value: Any) -> bool:
        """Note what holds numbers in itself: generators of random numbers and arrays."""
        numpy: Any = sys.modules.get("numpy")
        if isinstance(value, random.Random):
            self._state(value.getstate, value.setstate)
        elif isinstance(value, torch.Generator):
            self._state(value.get_state, value.set_state)
        elif numpy is None:
            return False
        elif isinstance(value, numpy.random.Generator):
            bits: Any = value.bit_generator
            state = bits.state
            self.restores.append(lambda: setattr(bits, "state", state))
        elif isinstance(value, numpy.random.RandomState):
            self._state(value.get_state, value.set_state)
        elif isinstance(value, numpy.ndarray):
            if value.flags.writeable and value.nbytes <= _MOST_ARRAY_BYTES:
                before = value.copy()
                self.restores.append(lambda: numpy.copyto(value, before))
        else:
            return False
        return True

    def _state(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        state = read()

        def restore() -> None:
            write(state)

        self.restores.append(restore)

    def random_numbers(self) -> None:
        """The generators that everybody shares."""
        self._state(torch.get_rng_state, torch.set_rng_state)
        self._state(random.getstate, random.setstate)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None:
            self._state(numpy.random.get_state, numpy.random.set_state)

    def _object(self, value: Any) -> None:
        kind = type(value)
        # torch's modules have hooks and layers of the user's in them; other objects of its are its.
        if _is_foreign(kind.__module__) and not isinstance(
            value, torch.nn.Module | torch.optim.Optimizer | types.SimpleNamespace
        ):
            return
        self.add(kind)
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self.add(attributes)
        for name in (n for base in kind.__mro__ for n in _slots(base)):
            self._attribute(value, name, getattr(value, name, _MISSING))

    def _attribute(self, owner: Any, name: str, before: Any) -> None:
        self.add(before)
        before = _twin(before)

        def restore() -> None:
            if getattr(owner, name, _MISSING) is not before:
                with contextlib.suppress(AttributeError, TypeError):
                    delattr(owner, name) if before is _MISSING else setattr(owner, name, before)

        self.restores.append(restore)

    # ---- Code --------------------------------------------------------------------------------

    def _class(self, kind: type) -> None:
        if _is_foreign(kind.__module__):
            return
        self._all(*kind.__mro__[1:])
        before = {
            name: value
            for name, value in vars(kind).items()
            if not (name.startswith("__") and name.endswith("__")) or callable(value)
        }
        self._all(*before.values())

        def restore() -> None:
            for name in [*vars(kind)]:
                special = name.startswith(("_abc", "__"))
                if name not in before and not special:
                    delattr(kind, name)
            for name, value in before.items():
                if vars(kind).get(name, _MISSING) is not value and not name.startswith("_abc"):
                    setattr(kind, name, value)

        self.restores.append(restore)

    def _function(self, function: types.FunctionType) -> None:
        # A decorator of torch's (``no_grad``) is torch's code around the user's.
        self._all(*(cell_value(cell) for cell in function.__closure__ or ()))
        self.add(getattr(function, "__wrapped__", None))
        if _is_foreign(function.__module__):
            return
        self._all(function.__dict__, function.__defaults__, function.__kwdefaults__)
        for cell in function.__closure__ or ():
            self._cell(cell)
        names = set(_names(function.__code__))
        self._namespace(function.__globals__, names, created=True)

    def _cell(self, cell: types.CellType) -> None:
        if id(cell) in self._seen:
            return
        self._seen[id(cell)] = cell
        before = _twin(cell_value(cell))

        def restore() -> None:
            if cell_value(cell) is not before and before is not _MISSING:
                cell.cell_contents = before

        self.restores.append(restore)

    def _namespace(self, values: dict[str, Any], names: set[str], *, created: bool) -> None:
        """The globals that a function names, and those of modules of the user's among them."""
        names = names - self._named[id(values)]
        self._named[id(values)] |= names
        before = {name: _twin(values[name]) for name in names if name in values}
        missing = names - before.keys() if created else set()
        for name in before:
            value = values[name]
            if isinstance(value, types.ModuleType):
                if not _is_foreign(value.__name__):
                    self._namespace(vars(value), names, created=False)
            else:
                self.add(value)

        def restore() -> None:
            for name, value in before.items():
                if values.get(name, _MISSING) is not value:
                    values[name] = value
            for name in missing:
                values.pop(name, None)

        self.restores.append(restore)

    def _cache(self, cached: Any) -> None:
        self.add(cached.__wrapped__)
        misses = cached.cache_info().misses

        def restore() -> None:
            if cached.cache_info().misses != misses:
                cached.cache_clear()

        self.restores.append(restore)


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def cell_value(cell: types.CellType) -> Any:
    """What a variable of a closure holds."""
    try:
        return cell.cell_contents
    except ValueError:  # Not bound yet.
        return _MISSING


def _twin(value: Any) -> Any:
    """What takes the place of a value at the end: a copy of what only moves on when it is used."""
    if not isinstance(value, _ITERATORS):
        return value
    with contextlib.suppress(TypeError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return copy.copy(value)
    return value
