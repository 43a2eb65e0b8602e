"""Which line of the user's code is running: outside of torch, hotloop and the standard library."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from types import FrameType

import torch

_SKIPPED = tuple(
    os.path.normpath(path) + os.sep
    for path in (
        os.path.dirname(torch.__file__),
        sysconfig.get_path("stdlib"),
        os.path.dirname(os.path.dirname(__file__)),
    )
)


def user_line() -> str:
    """``file:line`` of the nearest frame outside torch, hotloop and the standard library."""
    frame = sys._getframe(1)
    while frame is not None:
        name = _name_of_users_file(frame.f_code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def is_asked_by_user(frame: FrameType | None) -> bool:
    """Whether a frame is neither torch's nor hotloop's, nor called by one of these."""
    torchs, standard, own = _SKIPPED
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith((torchs, own)):
            return False
        if not path.startswith((standard, "<frozen")):
            return True
        frame = frame.f_back
    return False


@functools.cache
def _name_of_users_file(path: str) -> str | None:
    if path.startswith(_SKIPPED) or path.startswith("<frozen"):
        return None
    return os.path.basename(path)
