"""torch's compiler is imported when something compiles, not when an optimizer makes a step.

torch marks functions as not to be compiled (methods of optimizers, shape functions of operations),
and imports ``torch._dynamo`` at the first call of one only to say so to it: 36 MiB, and 1 s of a
cold command. A stand-in answers what they ask and gives way to the compiler at any other question.

Only for processes of hotloop's own, the commands that train: in a program of the user's nothing is
put in a module's place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from typing import Any

_NAME = "torch._dynamo"
# torch keeps on a function what the compiler made of it.
_KEPT = "__dynamo_disable"


class _StandIn(types.ModuleType):
    """Answers for the compiler what a process that compiles nothing asks of it."""

    def __init__(self, path: list[str]) -> None:
        super().__init__(_NAME)
        self.__path__ = path  # Its settings are a module of their own, which is light.
        self._functions: list[Any] = []

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """The function, which nobody compiles."""
        if fn is None:
            return self._compiler().disable(recursive=recursive, **options)
        self._functions.append(fn)
        return fn

    def graph_break(self, msg: str = "") -> None:
        """Nothing: there is no graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._compiler(), name)

    def _compiler(self) -> Any:
        """The compiler itself, from now on for everybody."""
        if sys.modules.get(_NAME) is self:
            for name in [n for n in sys.modules if n == _NAME or n.startswith(_NAME + ".")]:
                del sys.modules[name]
            for function in self._functions:
                with contextlib.suppress(AttributeError):
                    delattr(function, _KEPT)
        return importlib.import_module(_NAME)


def import_compiler_on_demand() -> None:
    """Put the stand-in in the compiler's place, unless it has been imported already."""
    if _NAME in sys.modules:
        return
    import torch

    spec = importlib.util.find_spec("torch")
    folders = spec.submodule_search_locations if spec else None
    if folders and hasattr(torch, "_compile"):
        sys.modules[_NAME] = _StandIn([f"{folder}/_dynamo" for folder in folders])
