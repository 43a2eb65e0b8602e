"""Watches of what code reads: functions, variables of closures, names of globals, classes."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import guards_memory as memory
from .guards_watch import MISSING, Label, NamedWatch, Watch, difference


@dataclass(eq=False)
class Named:
    """A dict of which those values count that code names: globals, a module, an object."""

    owner: Any
    values: dict[str, Any]
    label: Label
    depth: int
    # Every attribute name of the code that is reached; else those in `wanted` alone.
    by_attribute: bool
    wanted: dict[str, None] = field(default_factory=dict)
    expanded: dict[str, bool] = field(default_factory=dict)

    @property
    def is_globals(self) -> bool:
        """Whether it is a dict of globals, which has names that have nothing to do with a step."""
        return self.owner is self.values or isinstance(self.owner, types.ModuleType)

    def watch(self, *, whole: bool) -> Watch:
        """The values that count. ``whole``: all of them, also those that come later."""
        label, owner, names, values = self.label, self.owner, sorted(self.expanded), self.values
        expanded = {name for name, is_watched in self.expanded.items() if is_watched}

        def say(name: Any, old: Any, new: Any) -> str:
            return difference(label.attribute(name), old, new)

        def read() -> dict[str, Any]:
            now = vars(owner)
            return dict(now) if whole else {name: now.get(name, MISSING) for name in names}

        if not self.is_globals:
            return Watch(
                f"attributes of {label}",
                read,
                say,
                lambda: memory.attribute_words(owner),
                alive=(owner, vars(owner)),
                expanded=expanded,
            )
        return NamedWatch(
            f"names {label}",
            lambda: {name: values.get(name, MISSING) for name in names},
            say,
            lambda: memory.dict_words(values),
            alive=(values,),
            expanded=expanded,
            values=values,
        )


def function_watch(function: types.FunctionType, what: str) -> Watch:
    """A function's code and default values."""

    def read() -> dict[str, Any]:
        by_keyword = function.__kwdefaults__ or {}
        return {
            "code": function.__code__,
            "default values": function.__defaults__,
            "default values by keyword": tuple(by_keyword.items()),
        }

    def words() -> list[memory.Word] | None:
        found = memory.function_words(function)
        by_keyword = memory.dict_words(function.__kwdefaults__ or {})
        if found is None or by_keyword is None:
            return None
        return found + by_keyword if function.__kwdefaults__ else found

    return Watch(
        what,
        read,
        lambda name, old, new: difference(f"{name} of {what}", old, new),
        words,
        alive=(function, function.__kwdefaults__),
    )


def cell_watch(cell: types.CellType, name: str, label: Label) -> Watch:
    """A variable of a closure."""

    def read() -> dict[str, Any]:
        try:
            return {name: cell.cell_contents}
        except ValueError:
            return {name: MISSING}

    return Watch(
        str(label),
        read,
        lambda _, old, new: difference(label, old, new),
        lambda: memory.cell_words(cell),
        alive=(cell,),
    )


def class_watch(kind: type, what: str, counts: Callable[[str, Any], bool]) -> Watch:
    """Those of a class's own attributes that ``counts`` says."""
    return Watch(
        what,
        lambda: {name: v for name, v in vars(kind).items() if counts(name, v)},
        lambda name, old, new: difference(
            f"class attribute {name} of {kind.__qualname__}", old, new
        ),
        lambda: memory.class_words(kind),
        alive=(kind,),
    )
