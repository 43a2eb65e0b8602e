"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys


def give_back_memory() -> None:
    """Let the C library return what it keeps for later: a run that follows needs it elsewhere.

    glibc keeps up to 64 MiB after large tensors were freed; other libraries lack the call and keep
    what they keep.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_pages(address: int, num_bytes: int) -> None:
    """Give the whole pages in a piece of memory back; they are zeros when they are used again.

    Elsewhere than on Linux they stay.
    """
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform != "linux" or end <= begin:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(begin, end - begin, mmap.MADV_DONTNEED)
