"""One place where Python keeps values that count: how it is read, compared and named."""

from __future__ import annotations

import enum
import math
import types
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from operator import is_
from typing import Any, Final

import numpy
import torch

from .guards_memory import Word

_MOST_TEXT = 60


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING: Final = _Missing()
# Compared by value; none of them can be changed in place.
PLAIN = (
    bool, int, float, complex, str, bytes, type(None), enum.Enum, range, slice, type(Ellipsis),
    torch.dtype, torch.device, torch.layout, torch.memory_format, numpy.generic, numpy.dtype,
)  # fmt: skip
# What these stand for may be gone.
PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
# Compared by what is in them, each in a watch of its own.
_CONTAINERS = (list, dict, set, deque, bytearray)


@dataclass(frozen=True)
class Label:
    """What a message calls a place: "attribute config.rate of module fc (Linear)"."""

    kind: str
    path: str
    of: str

    def attribute(self, name: str) -> Label:
        """An attribute of what stands here."""
        return replace(self, path=f"{self.path}.{name}" if self.path else name)

    def item(self, key: Any) -> Label:
        """What a container that stands here has for a key."""
        return replace(self, path=f"{self.path}[{_text(key)}]")

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind, self.path, self.of) if part)


# Names a difference in one line: of a name, the old and the new value, each maybe ``MISSING``.
Say = Callable[[Any, Any, Any], str]


def _no_words() -> list[Word]:
    return []


@dataclass(eq=False)
class Watch:
    """Values read from one place, and the memory that shows a change of them.

    Attributes:
        key: names the place; no other watch has it.
        read: the values by name, as they are now.
        say: names a difference.
        words: memory that differs when a value does; ``None``: compare the values each time.
        ordered: the order of the names counts.
        expanded: names whose values have watches of their own.
        kept: the values of the snapshot.
        alive: what must not go away while words of it are looked at.
    """

    key: str
    read: Callable[[], Mapping[Any, Any]]
    say: Say
    words: Callable[[], list[Word] | None] = _no_words
    ordered: bool = False
    alive: tuple[Any, ...] = ()
    expanded: set[Any] = field(default_factory=set)
    kept: dict[Any, Any] = field(default_factory=dict)

    def check(self) -> tuple[str | None, bool]:
        """What has changed, and whether this watch alone can tell.

        Values that are equal are kept in place of those that were. Not sure: an object was
        exchanged for another one of its kind, and nothing here says what is in that.
        """
        now = self.read()
        message = self._missing(now)
        if message is not None:
            return message, True
        sure = True
        for name, old in self.kept.items():
            new = now[name]
            if new is old:
                continue
            equal = same(old, new)
            if equal is None and name in self.expanded:
                sure = False
            elif not equal:
                return self.say(name, old, new), True
            else:
                self.kept[name] = new
        return None, sure

    def differs_from(self, fresh: Watch) -> str | None:
        """The first difference from a newer watch of this place, but for what has its own watch."""
        message = self._missing(fresh.kept)
        if message is not None:
            return message
        for name, old in self.kept.items():
            new = fresh.kept[name]
            equal = same(old, new)
            if equal is None:
                equal = name in self.expanded and name in fresh.expanded
            if not equal:
                return self.say(name, old, new)
        return None

    def _missing(self, now: Mapping[Any, Any]) -> str | None:
        kept = self.kept
        if kept.keys() != now.keys():
            for name in [*kept, *now]:
                if name not in now or name not in kept:
                    return self.say(name, kept.get(name, MISSING), now.get(name, MISSING))
        if self.ordered and list(kept) != list(now):
            name = next(a for a, b in zip(kept, now, strict=True) if a != b)
            return f"the order of {self.key} changed, from {_text(name)} on"
        return None


@dataclass(eq=False)
class NamedWatch(Watch):
    """Some values of a dict that has others too, such as the globals of a script.

    Attributes:
        values: the dict. refreshed: how often the dict had changed and these values had not.
    """

    values: dict[Any, Any] = field(default_factory=dict)
    refreshed: int = 0

    def check(self) -> tuple[str | None, bool]:
        """As ``Watch.check``; quick where the same objects are there."""
        kept = self.kept
        if all(map(is_, map(self.values.get, kept, repeat(MISSING)), kept.values())):
            return None, True
        return super().check()


def same(old: Any, new: Any) -> bool | None:
    """Whether two values count as one; ``None``: it depends on what is in them."""
    if old is new:
        return True
    if type(old) is not type(new) or type(old) in PROXIES:
        return False
    if isinstance(old, float | complex | numpy.inexact):
        return bool(_bits(old) == _bits(new))
    if isinstance(old, enum.Enum):
        return False
    if isinstance(old, PLAIN):
        return bool(old == new)
    if isinstance(old, tuple):
        return _all(len(old) == len(new), zip(old, new, strict=False))
    if isinstance(old, frozenset):
        return bool(old == new)
    if isinstance(old, types.MethodType):
        return bool(old.__func__ is new.__func__ and old.__self__ is new.__self__)
    if isinstance(old, types.FunctionType | type | types.ModuleType | torch.Tensor):
        return False
    if isinstance(old, torch.nn.Module):
        return False
    if isinstance(old, _CONTAINERS) or hasattr(old, "__dict__") or hasattr(old, "__slots__"):
        return None
    return False


def _all(first: bool, pairs: Any) -> bool | None:
    answers: set[bool | None] = {first}
    if first:
        answers |= {same(a, b) for a, b in pairs}
    if False in answers:
        return False
    return None if None in answers else True


def _bits(value: Any) -> Any:
    """A number, so that NaN equals NaN and 0.0 differs from -0.0."""
    if isinstance(value, complex | numpy.complexfloating):
        return _bits(value.real), _bits(value.imag)
    number = float(value)
    return ("nan",) if math.isnan(number) else (number, math.copysign(1.0, number))


def difference(what: object, old: Any, new: Any) -> str:
    """One line that names a place, and the values where they are short."""
    if old is MISSING and new is not MISSING:
        return f"{what} was added"
    if new is MISSING and old is not MISSING:
        return f"{what} was removed"
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return f"{what} was assigned anew"
    if old is MISSING or (not _is_short(old) and not _is_short(new)):
        return f"{what} was replaced"
    return f"{what} changed from {_text(old)} to {_text(new)}"


def _is_short(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(_is_short(item) for item in value)
    return isinstance(value, PLAIN)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if not _is_short(value):
        name = getattr(value, "__qualname__", None)
        return str(name) if name else f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 3] + "..."
