"""Watches of what Python keeps outside of attributes and containers: compared each time."""

from __future__ import annotations

import array
import contextvars
import ctypes
import io
import os
import threading
from collections.abc import Iterator
from typing import Any

from . import guards_memory as memory
from .guards_places import dict_watch
from .guards_watch import MISSING, Label, Watch, difference

# The base of all types of ctypes has no name of its own.
_C_DATA: Any = ctypes.c_int.__mro__[-2]
_MOST_BYTES = 1 << 16
ENVIRONMENT = frozenset({"environ", "getenv"})


def outside_watch(value: Any, label: Label) -> Watch | None:
    """Values of a context variable, of a thread, of C memory; ``None``: it is none of them."""
    if isinstance(value, contextvars.ContextVar):
        return _compared(value, label, lambda: {"": value.get(MISSING)})
    if isinstance(value, threading.local):
        return _compared(value, label, lambda: dict(vars(value)))
    if type(value).__module__ == "multiprocessing.sharedctypes" and hasattr(value, "get_obj"):
        value = value.get_obj()
    if isinstance(value, array.array) and len(value) * value.itemsize <= _MOST_BYTES:
        return _compared(value, label, lambda: {"": value.tobytes()})
    if isinstance(value, _C_DATA) and ctypes.sizeof(value) <= _MOST_BYTES:
        return _compared(
            value,
            label,
            lambda: {"": ctypes.string_at(ctypes.addressof(value), ctypes.sizeof(value))},
        )
    return environment_watch() if isinstance(value, os._Environ) else None


def environment_watch() -> Watch:
    """The variables of the process's environment."""
    values: dict[Any, Any] = getattr(os.environ, "_data", {})

    def say(name: Any, old: Any, new: Any) -> str:
        return difference(f"variable {os.fsdecode(name)} of the environment", old, new)

    watch = dict_watch(values, "the environment", say)
    watch.ordered = False
    return watch


def is_taken_from(value: Any) -> bool:
    """Whether something gives another value each time that it is asked, and nobody sees which."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


def _compared(value: Any, label: Label, read: Any) -> Watch:
    def say(name: Any, old: Any, new: Any) -> str:
        if isinstance(old, bytes):
            return f"{label} was changed in place"
        return difference(label.attribute(name) if name else label, old, new)

    def words() -> list[memory.Word] | None:
        return None

    return Watch(f"values of {label}", read, say, words, alive=(value,))
