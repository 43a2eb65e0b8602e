"""The C++ compiler that Inductor makes compiled steps with: the only thing here that needs one."""

from __future__ import annotations

import functools
import os
import shutil

from ..errors import RunError

_COMPILERS = ("g++", "clang++", "c++")


@functools.cache
def compiler() -> str:
    """What ``CXX`` names, or the first compiler on the path.

    Raises:
        RunError: there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise RunError(
        "a compiled step needs a C++ compiler",
        got=named or f"none of {', '.join(_COMPILERS)}",
        next_step="install g++, or set plan step.compile to 'off'",
    )


def missing_reason() -> str | None:
    """Why nothing can be compiled here, in one line; ``None``: it can."""
    try:
        compiler()
    except RunError as error:
        return str(error)
    return None


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return missing_reason() is None
