"""Notices what a function does that no program would do again: it prints, sends, asks the time."""

from __future__ import annotations

import builtins
import io
import logging
import os
import sys
from types import FrameType
from typing import Any

from ..graph.user_code import is_asked_by_user, user_line

_CALLS = frozenset({id(builtins.print), id(builtins.input), id(builtins.open), id(os.write)})
_MODULES = frozenset({"_socket", "_posixsubprocess", "_queue", "_multiprocessing", "mmap"})
# The answer may be another one at the next call. torch asks them too.
_ANSWERS = frozenset({"time", "posix", "nt"})
_CLOCKS = frozenset({"now", "utcnow", "today"})
# Files of code that acts outside of the function, whatever it calls.
_FOLDERS = tuple(
    os.path.join(os.path.dirname(os.__file__), name)
    for name in ("multiprocessing" + os.sep, "queue.py", "subprocess.py")
)
# Called for each message that some level lets through; torch asks for the level itself.
_LOGS = logging.Logger.callHandlers.__code__
_SAVES = os.path.join("torch", "serialization.py")
_FILES = (io.IOBase,)


class Effects:
    """While entered, looks at each call that Python makes.

    Where somebody else does so already (a profiler), nothing is looked at.

    Attributes:
        found: the first call of that kind, with the line of the user's code; ``None``: none.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self._looks = False

    def __enter__(self) -> Effects:
        self._looks = sys.getprofile() is None
        if self._looks:
            sys.setprofile(self._see)
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._looks:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        if self.found is not None:
            return
        if event == "c_call":
            owner = getattr(called, "__self__", None)
            module = getattr(called, "__module__", None)
            acts = id(called) in _CALLS or isinstance(owner, _FILES) or module in _MODULES
            if acts or (_asks(called, owner, module) and is_asked_by_user(frame)):
                self._note(called.__name__)
        elif event == "call":
            path = frame.f_code.co_filename
            if path.startswith(_FOLDERS) or path.endswith(_SAVES) or frame.f_code is _LOGS:
                self._note(frame.f_code.co_name)

    def _note(self, name: str) -> None:
        self.found = f"{user_line()} calls {name}, which acts outside of the step"


def _asks(called: Any, owner: Any, module: str | None) -> bool:
    if module in _ANSWERS:
        return True
    return isinstance(owner, type) and owner.__module__ == "datetime" and called.__name__ in _CLOCKS
