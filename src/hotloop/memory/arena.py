"""One anonymous memory mapping: aligned, touched before use, on huge pages when asked.

A mapping of its own, not ``torch.empty``, because alignment, page size and first touch are then
ours to choose, and because a block that is never given back cannot fragment the heap.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Literal, get_args

import torch

from ..errors import InputError, PlanError
from ..units import format_bytes
from .layout import round_up

HugePages = Literal["never", "try", "require"]

_THP = Path("/sys/kernel/mm/transparent_hugepage")
_SMAPS = Path("/proc/self/smaps")


class Arena:
    """A block of zeroed memory that every tensor viewing it keeps alive.

    Args:
        num_bytes: size; at least 1.
        align_bytes: alignment of the first byte, a power of two.
        huge_pages: ``"never"`` keeps the kernel from using transparent huge pages here, whatever
            the machine's setting, so that a comparison of both is one; ``"try"`` asks for them
            and goes on without; ``"require"`` refuses to go on without. The tail of the arena that
            does not fill a huge page stays on ordinary pages: the size never grows.

    Attributes:
        block: uint8 tensor ``[num_bytes]``.
        huge_page_bytes: bytes of the arena that lie on huge pages, counted by the kernel after
            every page was touched; 0 for ``"never"``; ``None`` where the kernel does not say.
        huge_pages_backed: whether every whole huge page of the arena is one; ``None``: unknown.

    Raises:
        PlanError: ``huge_pages`` is not one of the three, or required and not possible.
        InputError: the size is not positive, or the system does not have the memory.
    """

    def __init__(
        self, num_bytes: int, *, align_bytes: int = 64, huge_pages: HugePages = "never"
    ) -> None:
        if num_bytes < 1:
            raise InputError("an arena must have at least 1 byte", got=num_bytes)
        if huge_pages not in get_args(HugePages):
            raise PlanError("huge_pages must be never, try or require", got=repr(huge_pages))
        mode = transparent_huge_pages()
        page_bytes = _huge_page_bytes()
        if huge_pages == "require":
            _check_possible(num_bytes, mode, page_bytes)
        asked = huge_pages != "never"
        align = max(align_bytes, page_bytes if asked else 1)
        # An ordinary page is kept on each side of the advised range: the kernel merges
        # neighbouring mappings of equal kind, and smaps could then not tell ours from another's.
        # Pages that nobody touches cost address space only.
        slack = align + 2 * mmap.PAGESIZE
        mapping = _map(round_up(num_bytes, mmap.PAGESIZE) + slack)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        offset = mmap.PAGESIZE + -(whole.data_ptr() + mmap.PAGESIZE) % align
        advised = round_up(num_bytes, mmap.PAGESIZE)
        if asked or mode == "always":
            _advise(mapping, "MADV_HUGEPAGE" if asked else "MADV_NOHUGEPAGE", offset, advised)
        self.block = whole[offset : offset + num_bytes]
        self.block.zero_()  # Faults every page in now, so that none is faulted in the hot loop.

        self.huge_page_bytes: int | None = 0
        self.huge_pages_backed: bool | None = False
        if asked:
            start = self.block.data_ptr()
            self.huge_page_bytes = mapped_huge_bytes(start, start + advised)
            whole_pages = num_bytes // page_bytes * page_bytes
            if self.huge_page_bytes is None:
                self.huge_pages_backed = None
            else:
                self.huge_pages_backed = 0 < whole_pages <= self.huge_page_bytes
        if huge_pages == "require" and not self.huge_pages_backed:
            raise PlanError(
                "huge_pages='require' needs every page of the pool on a huge page",
                got=f"{format_bytes(self.huge_page_bytes)} of {format_bytes(num_bytes)}",
                next_step="free memory, or use huge_pages='try'",
            )


def transparent_huge_pages() -> str | None:
    """The kernel's setting, ``"always"``, ``"madvise"`` or ``"never"``; ``None`` if unknown."""
    try:
        text = (_THP / "enabled").read_text()
    except OSError:
        return None
    inside = text.partition("[")[2].partition("]")[0]
    return inside or None


def mapped_huge_bytes(start: int, end: int, smaps: Path = _SMAPS) -> int | None:
    """Bytes on transparent huge pages in the mapping ``[start, end)`` of this process.

    From ``AnonHugePages`` of ``/proc/self/smaps`` (proc_pid_smaps(5)). ``None`` where there is no
    such file, or the range is not exactly one mapping.
    """
    wanted = f"{start:x}-{end:x}"
    inside = False
    try:
        with smaps.open() as lines:
            for line in lines:
                key, _, rest = line.partition(" ")
                if not key.endswith(":"):
                    inside = "-".join(part.lstrip("0") for part in key.split("-")) == wanted
                elif inside and key == "AnonHugePages:":
                    return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _huge_page_bytes() -> int:
    try:
        return int((_THP / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 2 * 1024**2


def _check_possible(num_bytes: int, mode: str | None, page_bytes: int) -> None:
    if mode not in ("always", "madvise") or not hasattr(mmap, "MADV_HUGEPAGE"):
        raise PlanError(
            "huge_pages='require' needs transparent huge pages set to madvise or always",
            got=mode or "no such setting on this system",
            next_step=f"write madvise to {_THP}/enabled as root, or use huge_pages='try'",
        )
    if num_bytes < page_bytes:
        raise PlanError(
            f"huge_pages='require' needs a pool of at least one page of {format_bytes(page_bytes)}",
            got=format_bytes(num_bytes),
            next_step="use huge_pages='never', or larger or more buffers",
        )


def _map(num_bytes: int) -> mmap.mmap:
    # Private: anonymous memory that is shared lives in shmem, which has a huge-page switch apart.
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(
            "the system must have the memory for the batch buffers",
            got=f"{format_bytes(num_bytes)}: {error}",
            next_step="fewer buffers or a smaller batch",
        ) from None


def _advise(mapping: mmap.mmap, advice: str, offset: int, num_bytes: int) -> None:
    # A kernel without huge pages refuses the advice; what came of it is read back from smaps.
    if hasattr(mmap, advice):
        try:
            mapping.madvise(getattr(mmap, advice), offset, num_bytes)
        except OSError:
            return
