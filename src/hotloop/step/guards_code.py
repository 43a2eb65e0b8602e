"""What a function names, read from its code without running it."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

# What code only sets counts too: a program would not set it.
_GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"})
_ATTRIBUTES = frozenset(
    {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM", "STORE_ATTR", "DELETE_ATTR"}
)
# Who names one of these may read attributes that no code names.
DYNAMIC = frozenset({"getattr", "vars", "__dict__", "asdict", "astuple", "fields", "attrgetter"})
# Code of these is taken for constant.
_FIXED = tuple(
    str(Path(where).resolve())
    for where in (
        Path(torch.__file__).parent,
        Path(numpy.__file__).parent,
        Path(__file__).parents[1],
    )
)
_STANDARD = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib")}
)


@dataclass(frozen=True)
class Names:
    """What code names: globals that it reads or sets, attributes, and modules that it imports."""

    read: frozenset[str]
    attributes: frozenset[str]
    imported: frozenset[str]


@functools.lru_cache(maxsize=65536)
def names_of(code: types.CodeType) -> Names:
    """Names in a function's code and in the functions written inside it."""
    found: dict[str, set[str]] = {"read": set(), "attributes": set(), "imported": set()}
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBALS:
            found["read"].add(str(instruction.argval))
        elif instruction.opname in _ATTRIBUTES:
            found["attributes"].add(str(instruction.argval))
        elif instruction.opname == "IMPORT_NAME":
            found["imported"].add(str(instruction.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = names_of(constant)
            for part, names in found.items():
                names |= getattr(inner, part)
    return Names(**{part: frozenset(names) for part, names in found.items()})


_frameworks: list[str] = []


def take_for_constant(path: str) -> None:
    """Take the code of a file, or below a folder, for constant.

    It is that of a framework whose state its integration watches.
    """
    _frameworks.append(str(Path(path).resolve()))
    is_users_file.cache_clear()


@functools.lru_cache(maxsize=65536)
def is_users_file(path: str) -> bool:
    """Whether code of a file is neither torch's, NumPy's, hotloop's nor the standard library's."""
    if path.startswith("<"):
        return not path.startswith("<frozen")
    resolved = str(Path(path).resolve())
    if any(resolved == it or _is_below(resolved, it) for it in (*_FIXED, *_frameworks)):
        return False
    if "site-packages" in resolved or "dist-packages" in resolved:
        return True
    return not any(_is_below(resolved, folder) for folder in _STANDARD)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder + "/")


def is_users_function(function: types.FunctionType) -> bool:
    """Whether a function is the user's, or of a library that may read what the user sets."""
    return is_users_file(function.__code__.co_filename)


def is_users_module(module: types.ModuleType | None) -> bool:
    """The same of a module."""
    if module is None:
        return True  # Run from text, or loaded in a way of its own.
    path = getattr(module, "__file__", None)
    if path:
        return is_users_file(path)
    top = module.__name__.partition(".")[0]
    return top not in ("torch", "numpy", "hotloop", *sys.builtin_module_names)


def is_users_class(kind: type) -> bool:
    """The same of a class."""
    return is_users_module(sys.modules.get(kind.__module__))


def file_of(globals_of: dict[str, Any]) -> str:
    """What a message calls the place of a global: the file's name."""
    path = globals_of.get("__file__")
    return Path(path).name if path else str(globals_of.get("__name__", "the script"))
