"""Which code ran in a step: what other code reads, the step did not depend on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from .guards_code import is_users_file

# By the id of the code, which is kept: the code, and the globals that it ran with.
Ran = dict[int, tuple[CodeType, dict[str, Any]]]


class CodeRun:
    """While entered, notes each function of Python's that begins.

    Where somebody else looks at each call already (a profiler), nothing is noted.

    Attributes:
        ran: what was noted, when it was left; ``None``: nobody knows.
        look: what ``sys.setprofile`` was given; ``None``: nothing.
    """

    def __init__(self) -> None:
        self.ran: Ran | None = None
        self._found: Ran = {}
        self.look: Callable[..., Any] | None = None

    def __enter__(self) -> CodeRun:
        if sys.getprofile() is None:
            self.look = self._see  # One object: each access makes another one.
            sys.setprofile(self.look)
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.look is not None and sys.getprofile() is self.look:
            sys.setprofile(None)
            self.ran = self._found

    def _see(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            code = frame.f_code
            if id(code) not in self._found:
                self._found[id(code)] = code, frame.f_globals


def users(ran: Ran) -> Ran:
    """The part that guards follow."""
    return {key: found for key, found in ran.items() if is_users_file(found[0].co_filename)}
