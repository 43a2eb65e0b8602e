"""Finds what a train step takes for constant: everything plain that model and loss can reach."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import sys
import types
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import nn

from .guards_code import (
    DYNAMIC,
    file_of,
    is_users_class,
    is_users_file,
    is_users_function,
    is_users_module,
    names_of,
)
from .guards_code_places import Named, cell_watch, class_watch, function_watch
from .guards_outside import ENVIRONMENT, environment_watch, is_taken_from, outside_watch
from .guards_places import (
    container_watch,
    module_watches,
    partial_watch,
    slots_of,
    slots_watch,
)
from .guards_ran import Ran
from .guards_watch import MISSING, PLAIN, PROXIES, Label, Watch

# Objects in objects that are followed so far, and items of one container.
_DEEPEST = 8
GENERATORS = (
    random.Random, numpy.random.Generator, numpy.random.RandomState, torch.Generator,
)  # fmt: skip
_NAMESPACES = (
    types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap,
)  # fmt: skip
_METHODS = (types.FunctionType, property, classmethod, staticmethod, functools.cached_property)
# Of a class whose instances are there already: not run in a step.
_NOT_RUN = frozenset(
    {
        "__init__", "__new__", "__post_init__", "__repr__", "__str__", "__reduce__",
        "__reduce_ex__", "__getstate__", "__setstate__", "__init_subclass__", "__del__",
        "__dir__", "__copy__", "__deepcopy__",
    }
)  # fmt: skip
# Methods of torch's own modules that a program may replace.
_FORWARD = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")


class Reach:
    """What model, loss and functions reach, as watches.

    Args:
        ran: code that ran in the step (``guards_ran``): only this is followed. As long as all that
            it names is as it was, the same code runs again. ``None``: whatever may run is followed.

    Attributes:
        watches: in an order that is the same for the same model.
        tensors: with a label, and whether it is a parameter or buffer.
        generators: of random numbers, by the place where they were found.
        iterators: places that code names.
    """

    def __init__(self, ran: Ran | None = None) -> None:
        self._ran = ran
        self._followed: set[int] = set()
        self.watches: list[Watch] = []
        self.tensors: dict[int, tuple[torch.Tensor, str, bool]] = {}
        self.generators: list[tuple[str, Any]] = []
        self.iterators: list[str] = []
        self._taken: list[Label] = []
        self._keys: set[str] = set()
        self._seen: dict[int, Any] = {}
        self._functions: deque[types.FunctionType] = deque()
        self._methods: dict[tuple[type, str], Any] = {}
        self._called: set[type] = set()
        self._named: dict[int, Named] = {}
        self._attributes: set[str] = set()

    def add(self, watch: Watch) -> Watch:
        """Keep a watch, under a key of its own, with the values as they are."""
        key, number = watch.key, 2
        while watch.key in self._keys:
            watch.key = f"{key} ({number})"
            number += 1
        self._keys.add(watch.key)
        watch.kept = dict(watch.read())
        self.watches.append(watch)
        return watch

    def finish(self) -> None:
        """Follow the code until it names nothing new."""
        while self._follow_functions() + self._follow_methods() + self._follow_names():
            pass
        if self._follow_code():
            while self._follow_functions() + self._follow_methods() + self._follow_names():
                pass
        for named in self._named.values():
            self.add(named.watch(whole=self._counts_whole(named)))
        if not ENVIRONMENT.isdisjoint(self._attributes):
            self.add(environment_watch())
        for label in self._taken:  # All attributes of a module are followed.
            name = label.path.rpartition(".")[2].partition("[")[0]
            if label.kind != "attribute" or name in self._attributes:
                self.iterators.append(str(label))

    # ---- Values ------------------------------------------------------------------------------

    def value(self, value: Any, label: Label, depth: int = 0) -> bool:
        """Follow a value; whether what is in it is watched, so that its identity need not be."""
        if value is MISSING or type(value) in PROXIES or isinstance(value, PLAIN):
            return False
        if isinstance(value, GENERATORS):
            if self._is_new(value):
                self.generators.append((str(label), value))
        elif isinstance(value, torch.Tensor):
            self.tensor(value, str(label), registered=False)
        elif isinstance(value, nn.Module):
            self.module(value, label.path)
        elif isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, label, depth)
            self.value(value.__self__, label, depth)
        elif isinstance(value, types.ModuleType):
            if is_users_module(value):
                self._names_in(value, vars(value), file_of(vars(value)), by_attribute=True)
        elif isinstance(value, type):
            if is_users_class(value):
                self._called.add(value)
                self._class(value)
        elif is_taken_from(value) and not is_users_class(type(value)):
            self._taken.append(label)
        elif depth <= _DEEPEST:
            return self._contents(value, label, depth)
        return False

    def _contents(self, value: Any, label: Label, depth: int) -> bool:
        if isinstance(value, tuple):
            return self._pieces(dict(enumerate(value)), label.item, depth)
        known = id(value) in self._seen
        watch = container_watch(value, label) or outside_watch(value, label)
        if watch is not None and self._is_new(value):
            self.add(watch)
            for name, item in list(watch.kept.items()):
                if self.value(item, label.item(name), depth + 1):
                    watch.expanded.add(name)
        if isinstance(value, functools.partial):
            if self._is_new(value):
                self._partial(value, label, depth)
            return True
        wrapped = getattr(value, "__wrapped__", None)
        if isinstance(wrapped, types.FunctionType):
            self.function(wrapped)
        if self._is_simple(value) and not known:
            self._object(value, label, depth)
        return watch is not None or self._is_simple(value)

    def _pieces(self, items: Mapping[Any, Any], place: Callable[[Any], Label], depth: int) -> bool:
        """Follow the items of something that itself cannot change."""
        answers = []
        for name, item in items.items():
            watched = self.value(item, place(name), depth + 1)
            if not isinstance(item, PLAIN):
                answers.append(watched)
        return bool(answers) and all(answers)

    def _partial(self, value: functools.partial[Any], label: Label, depth: int) -> None:
        watch = self.add(partial_watch(value, label))
        for name, part in list(watch.kept.items()):
            if self.value(part, label.attribute(name), depth + 1):
                watch.expanded.add(name)

    @staticmethod
    def _is_simple(value: Any) -> bool:
        """Whether an object is what its attributes are."""
        if isinstance(value, torch.optim.Optimizer | torch.utils.data.DataLoader):
            return False
        if not (hasattr(value, "__dict__") or slots_of(value)):
            return False
        return (
            isinstance(value, _NAMESPACES)
            or dataclasses.is_dataclass(value)
            or is_users_class(type(value))
        )

    def _object(self, value: Any, label: Label, depth: int) -> None:
        self._is_new(value)
        self._classes(type(value))
        slots = slots_of(value)
        if slots:
            watch = self.add(slots_watch(value, slots, label))
            for name, item in list(watch.kept.items()):
                if self.value(item, label.attribute(name), depth + 1):
                    watch.expanded.add(name)
        if hasattr(value, "__dict__"):
            whole = isinstance(value, _NAMESPACES) or dataclasses.is_dataclass(value)
            named = Named(value, vars(value), label, depth + 1, by_attribute=not whole)
            self._named.setdefault(id(value), named)

    def _is_new(self, value: Any) -> bool:
        """Whether this object was not met before; it is kept, so that its id stays its own."""
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = value
        return True

    # ---- Modules and tensors -------------------------------------------------------------------

    def tensor(self, value: torch.Tensor, what: str, *, registered: bool) -> None:
        """Note a tensor; its watch is made when it is known whether it is registered anywhere."""
        known = self.tensors.get(id(value))
        if known is None or (registered and not known[2]):
            self.tensors[id(value)] = value, what, registered

    def module(self, module: nn.Module, name: str) -> None:
        """Follow a module and its submodules. ``name``: as in ``named_modules``."""
        if not self._is_new(module):
            return
        dotted = f"{name}." if name else ""
        self._classes(type(module))
        attributes, *others = module_watches(module, name)
        self.add(attributes)
        for watch in others:
            self.add(watch)
        for key, value in list(attributes.kept.items()):
            if key not in attributes.expanded:
                place = Label("attribute", key, f"of {attributes.key}")
                if key != "__class__" and self.value(value, place):
                    attributes.expanded.add(key)
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, value in tensors.items():
                if value is not None:
                    self.tensor(value, f"{kind} {dotted}{key}", registered=True)
        for watch in others:
            for value in list(watch.kept.values()):
                if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
                    self.value(value, Label("hook", "", f"of {attributes.key}"))
        for key, value in module._modules.items():
            if value is not None:
                self.module(value, dotted + key)

    # ---- Code ----------------------------------------------------------------------------------

    def function(self, function: types.FunctionType) -> None:
        """Follow what a function's code names, where it is the user's."""
        runs = self._ran is None or id(function.__code__) in self._ran
        if runs and self._is_new(function):
            self._functions.append(function)

    def _follow_functions(self) -> int:
        count = len(self._functions)
        for _ in range(count):
            function = self._functions.popleft()
            wrapped = getattr(function, "__wrapped__", None)
            if isinstance(wrapped, types.FunctionType):
                self.function(wrapped)
            if is_users_function(function):
                self._function(function)
        return count

    def _function(self, function: types.FunctionType) -> None:
        values = function.__globals__
        file, called = file_of(values), function.__qualname__.replace("<locals>.", "")
        what = f"function {called} of {file}"
        watch = self.add(function_watch(function, what))
        own = Named(function, vars(function), Label("attribute", "", f"of {what}"), 1, True)
        self._named.setdefault(id(function), own)
        defaults = Label("default value", "", f"of {what}")
        for name in ("default values", "default values by keyword"):
            if watch.kept[name] and self.value(watch.kept[name], defaults):
                watch.expanded.add(name)
        self._code(function.__code__, values)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            self._cell(cell, name, called)

    def _code(self, code: types.CodeType, values: dict[str, Any]) -> None:
        """Follow what code names, run with these globals."""
        self._followed.add(id(code))
        names = names_of(code)
        self._attributes |= names.attributes | (names.read & DYNAMIC)
        named = self._names_in(values, values, file_of(values), by_attribute=False)
        named.wanted.update(dict.fromkeys(sorted(names.read)))
        for imported in sorted(names.imported):
            if imported in sys.modules:
                self.value(sys.modules[imported], Label("module", imported, ""))

    def _follow_code(self) -> int:
        """Follow code that ran and that no function which is reached has."""
        found = [both for key, both in (self._ran or {}).items() if key not in self._followed]
        for code, values in found:
            if is_users_file(code.co_filename):
                self._code(code, values)
        return len(found)

    def _cell(self, cell: types.CellType, name: str, called: str) -> None:
        if name == "__class__" or not self._is_new(cell):
            return

        label = Label("variable", name, f"in the closure of {called}")
        watch = self.add(cell_watch(cell, name, label))
        if self.value(watch.kept[name], label):
            watch.expanded.add(name)

    def _names_in(
        self, owner: Any, values: dict[str, Any], file: str, *, by_attribute: bool
    ) -> Named:
        label = Label("global", "", f"of {file}")
        named = self._named.setdefault(id(values), Named(owner, values, label, 0, False))
        named.by_attribute |= by_attribute
        return named

    def _follow_names(self) -> int:
        count = 0
        for named in list(self._named.values()):
            names = list(named.wanted)
            if self._counts_whole(named):
                names += list(named.values)
            elif named.by_attribute:
                names += [name for name in named.values if name in self._attributes]
                if not named.is_globals:  # What it has from its class it may get for itself.
                    names += [n for n in self._attributes if _is_of_class(type(named.owner), n)]
            for name in names:
                if name not in named.expanded:
                    count += 1
                    place = named.label.attribute(name)
                    value = named.values.get(name, MISSING)
                    named.expanded[name] = False  # Should it lead back here.
                    named.expanded[name] = self.value(value, place, named.depth)
        return count

    def _counts_whole(self, named: Named) -> bool:
        """Whether all that an object has counts, also what it gets later."""
        if named.is_globals:
            return False
        return not named.by_attribute or not self._attributes.isdisjoint(DYNAMIC)

    # ---- Classes -------------------------------------------------------------------------------

    def _classes(self, kind: type) -> None:
        for each in kind.__mro__:
            if is_users_class(each):
                self._class(each)
            elif issubclass(each, nn.Module) and self._is_new(each):
                what = f"class {each.__qualname__}"
                self.add(class_watch(each, what, lambda name, _: name in _FORWARD))

    def _class(self, kind: type) -> None:
        if not self._is_new(kind):
            return
        for base in kind.__mro__[1:]:
            if is_users_class(base):
                self._class(base)

        def counts(name: str, value: Any) -> bool:
            is_special = name.startswith("__") and name.endswith("__")
            return name != "_abc_impl" and (isinstance(value, _METHODS) or not is_special)

        watch = self.add(class_watch(kind, f"class {kind.__qualname__}", counts))
        for name, value in list(watch.kept.items()):
            if isinstance(value, _METHODS):
                self._methods[kind, name] = value
            elif self.value(value, Label("class attribute", name, f"of {kind.__qualname__}"), 1):
                watch.expanded.add(name)

    def _follow_methods(self) -> int:
        followed = 0
        for (kind, name), value in list(self._methods.items()):
            named = name in self._attributes or kind in self._called
            if self._ran is not None or named or _is_run_unnamed(kind, name):
                del self._methods[kind, name]
                followed += 1
                for part in ("fget", "fset", "__func__", "func"):
                    value = getattr(value, part, None) or value
                if isinstance(value, types.FunctionType):
                    self.function(value)
        return followed


def _is_of_class(kind: type, name: str) -> bool:
    return any(name in vars(each) for each in kind.__mro__)


def _is_run_unnamed(kind: type, name: str) -> bool:
    """Whether a method may run though no code of the user's names it: Python or torch do."""
    if name in _NOT_RUN:
        return False
    if name.startswith("__") and name.endswith("__"):
        return True
    return any(name in vars(base) for base in kind.__mro__ if not is_users_class(base))
