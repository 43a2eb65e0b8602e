"""Where Python code spends its time: the stacks of all threads, looked at now and then.

A look costs the interpreter lock for some ten microseconds. It sees functions of Python, not what
goes on inside a call of C; the function that made the call is what a reader can change.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Literal

from .metrics import HotSpot

_HOTLOOP = str(Path(__file__).resolve().parent.parent)
_INSTALLED = tuple(
    str(Path(path).resolve())
    for key in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(key))
)
# A thread whose innermost frame is one of these waits for another.
_WAITS = {"wait", "wait_for", "select", "poll", "acquire", "join", "get", "sleep", "accept", "recv"}
_MOST_KINDS = 1000
_MOST_DEEP = 64
_SHOWN = 8

Origin = Literal["user", "hotloop", "installed"]
_PACKAGES = {"site-packages", "dist-packages"}
_Place = tuple[Literal["data_wait", "step"], str, str, int, str]


class HotSpots:
    """Counts of the user's functions in which threads were seen, by phase.

    A frame of hotloop's ends the search: further out lies the loop itself.
    """

    def __init__(self) -> None:
        self._seen: Counter[_Place] = Counter()
        self._looks = {"data_wait": 0, "step": 0}
        self._origins: dict[str, Origin] = {}

    def look(self, phase: Literal["data_wait", "step"]) -> None:
        """Look at every thread but the calling one."""
        self._looks[phase] += 1
        me = threading.get_ident()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident == me or (place := self._place(frame)) is None:
                continue
            key: _Place = (phase, *place, names.get(ident, "?"))
            if key in self._seen or len(self._seen) < _MOST_KINDS:
                self._seen[key] += 1

    def found(self) -> tuple[HotSpot, ...]:
        """The hottest, as shares of the looks of their phase."""
        spots = [
            HotSpot(
                phase=phase, function=function, file=file, line=line, thread=thread,
                share=count / self._looks[phase],
            )
            for (phase, function, file, line, thread), count in tuple(self._seen.items())
        ]  # fmt: skip
        return tuple(sorted(spots, key=lambda spot: -spot.share)[:_SHOWN])

    def _place(self, frame: FrameType | None) -> tuple[str, str, int] | None:
        """The innermost function of the user's; ``None``: there is none, or the thread waits."""
        if frame is None:
            return None
        if frame.f_code.co_name in _WAITS and self._origin(frame.f_code.co_filename) != "user":
            return None
        for _ in range(_MOST_DEEP):
            code = frame.f_code
            origin = self._origin(code.co_filename)
            if origin == "hotloop":
                return None
            # A comprehension has a name nobody wrote; its function is the frame outside.
            unnamed = code.co_name.startswith("<") and code.co_name != "<module>"
            if origin == "user" and not unnamed:
                return code.co_qualname, code.co_filename, code.co_firstlineno
            if frame.f_back is None:
                return None
            frame = frame.f_back
        return None

    def _origin(self, file: str) -> Origin:
        known = self._origins.get(file)
        if known is None:
            path = file if file.startswith("<") else str(Path(file).resolve())
            if path.startswith(_HOTLOOP):
                known = "hotloop"
            elif path.startswith(("<", *_INSTALLED)) or _PACKAGES & set(Path(path).parts):
                known = "installed"
            else:
                known = "user"
            self._origins[file] = known
        return known
