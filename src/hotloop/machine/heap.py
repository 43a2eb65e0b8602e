"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_memory() -> None:
    """Let the C library return what it keeps for later: a run that follows needs it elsewhere.

    glibc keeps up to 64 MiB after large tensors were freed; other libraries lack the call and keep
    what they keep.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
