"""CPU tensors of a run in one range of memory whose use is known beforehand.

The general allocator either returns large blocks to the system and faults their pages in again
every step, or keeps them and fragments in ways nobody can predict. This one serves large tensors
best-fit from a reserved range and keeps their pages: after the first step none is faulted, and
``ArenaModel`` says beforehand how far the range will be used. ``docs/notes/tensor-arena.md`` has
the measurements.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from .. import kernels
from ..errors import PlanError, RunError
from ..kernels import binding
from ..units import GIB, MIB, format_bytes
from .arena import HugePages, transparent_huge_pages
from .arena_model import GRANULARITY_BYTES, THRESHOLD_BYTES, check_sizes

_LEAST_BYTES = 64 * MIB
_ADVICE = {"never": -1, "try": 1, "require": 1}


@dataclass(frozen=True)
class ArenaStats:
    """What the arena of this process holds; peaks since the process began or ``reset_peak``.

    Attributes:
        live_bytes, peak_live_bytes: rounded sizes of the blocks in use.
        num_live: blocks in use.
        top_bytes, peak_top_bytes: end of the highest block in use.
        touched_bytes: highest top since the last trim; at most this much is resident, and after a
            run in which every block was written to, this much was.
        free_bytes: holes below the top.
        capacity_bytes: how far blocks may be placed; the rest goes to the system's allocator.
        reserved_bytes: size of the reserved range of addresses (not memory).
        num_allocations, num_fallbacks: requests placed since the process began; those above the
            threshold that were not, for want of room.
    """

    live_bytes: int
    peak_live_bytes: int
    num_live: int
    top_bytes: int
    peak_top_bytes: int
    touched_bytes: int
    free_bytes: int
    capacity_bytes: int
    reserved_bytes: int
    num_allocations: int
    num_fallbacks: int


class ArenaEvent(NamedTuple):
    """A block placed at ``offset_bytes`` for a request of ``num_bytes``; ``None``: it was freed."""

    offset_bytes: int
    num_bytes: int | None


class TensorArena:
    """Context manager: large CPU tensors made inside come from the arena.

    There is one arena a process. Tensors that outlive the context stay valid for ever; their blocks
    go back to the arena when they are freed. Contexts nest and may overlap in several threads: the
    first one in sets the arena up, the others join it with its settings, with the last one out no
    more tensors come from it, and the pages of its free blocks are given back to the system.

    torch's own allocator stays: what it asks of the system comes from the arena
    (``kernels/cpp/allocator_hook.h``). Where that is not possible (no kernels here, another build
    of torch, no address space), the context changes nothing, and ``reason`` says why in one line.

    Args:
        huge_pages: ``"never"``, ``"try"`` or ``"require"`` transparent huge pages.
        threshold_bytes: smaller requests go to the system's allocator.
        granularity_bytes: sizes are rounded up to a multiple.
        capacity_bytes: most the arena may hold; larger demands go to the system's allocator.
            ``None``: four times the physical memory, of which only what is touched is used.
        keep_pages: leave the pages of free blocks in place when the last context ends, for one that
            is entered again and again; ``trim`` gives them back.

    Attributes:
        reason: why the arena is not used; ``None`` if it is, or before entering.

    Raises:
        PlanError: ``huge_pages`` is not one of the three, or required and switched off.
        InputError: a size is not possible.
    """

    def __init__(
        self,
        *,
        huge_pages: HugePages = "never",
        threshold_bytes: int = THRESHOLD_BYTES,
        granularity_bytes: int = GRANULARITY_BYTES,
        capacity_bytes: int | None = None,
        keep_pages: bool = False,
    ) -> None:
        if huge_pages not in get_args(HugePages):
            raise PlanError("huge_pages must be never, try or require", got=repr(huge_pages))
        if huge_pages == "require" and transparent_huge_pages() not in ("always", "madvise"):
            raise PlanError(
                "huge_pages='require' needs transparent huge pages set to madvise or always",
                got=transparent_huge_pages() or "no such setting on this system",
                next_step="use huge_pages='try'",
            )
        check_sizes(threshold_bytes, granularity_bytes, capacity_bytes)
        self.huge_pages = huge_pages
        self.threshold_bytes = threshold_bytes
        self.granularity_bytes = granularity_bytes
        self.capacity_bytes = capacity_bytes
        self.keep_pages = keep_pages
        self.reason: str | None = None
        self._installs: list[bool] = []

    @staticmethod
    def available() -> bool:
        """Whether large tensors can come from the arena here."""
        return unavailable_reason() is None

    @staticmethod
    def unavailable_reason() -> str | None:
        """Why ``available()`` is false, in one line; ``None`` if it is true."""
        return unavailable_reason()

    @property
    def installed(self) -> bool:
        """Whether this context is entered and large tensors come from the arena."""
        return any(self._installs)

    def __enter__(self) -> TensorArena:
        self.reason = unavailable_reason() or self._install()
        self._installs.append(self.reason is None)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._installs.pop():
            kernels.library().hotloop_arena_uninstall()
            if not self.keep_pages:
                self.trim()

    def stats(self) -> ArenaStats:
        """The counters now; all zero where the arena is not available."""
        counters = binding.ArenaCounters()
        if self.available():
            kernels.library().hotloop_arena_count(ctypes.byref(counters))
        return ArenaStats(*(getattr(counters, name) for name in ArenaStats.__dataclass_fields__))

    def reset_peak(self) -> None:
        """Let the peaks start again from what is in use now."""
        if self.available():
            kernels.library().hotloop_arena_reset_peak()

    def trim(self) -> None:
        """Give the pages of all free blocks back; the next use of them faults them in again."""
        if self.available():
            kernels.library().hotloop_arena_trim()

    def offset(self, tensor: torch.Tensor) -> int | None:
        """Bytes from the arena's base to the tensor's storage; ``None`` if it is not in it."""
        if not self.available() or tensor.device.type != "cpu":
            return None
        address = tensor.untyped_storage().data_ptr()
        offset: int = kernels.library().hotloop_arena_offset_of(address)
        return None if offset < 0 else offset

    @contextmanager
    def recording(self, max_events: int = 100_000) -> Iterator[list[ArenaEvent]]:
        """A list that holds, after the context, what all threads placed and freed in the arena.

        Replayed on ``ArenaModel`` this shows where a prediction and a run part.

        Raises:
            RunError: there were more than ``max_events``.
        """
        events: list[ArenaEvent] = []
        if not self.available():
            yield events
            return
        library = kernels.library()
        buffer = (binding.ArenaEvent * max_events)()
        library.hotloop_arena_record(buffer, max_events)
        try:
            yield events
        finally:
            count = library.hotloop_arena_record(None, 0)
        if count > max_events:
            raise RunError("a recording must fit its max_events", got=f"{count} events")
        events += [
            ArenaEvent(e.offset_bytes, None if e.requested_bytes < 0 else e.requested_bytes)
            for e in buffer[:count]
        ]

    def _install(self) -> str | None:
        library = kernels.library()
        wanted = self.capacity_bytes or _default_reserve_bytes()
        if library.hotloop_arena_reserve(wanted, min(wanted, _LEAST_BYTES)) == 0:
            return f"the system did not reserve {format_bytes(wanted)} of addresses, nor less"
        sizes = wanted, self.threshold_bytes, self.granularity_bytes
        try:
            kernels.call("hotloop_arena_install", *sizes, _ADVICE[self.huge_pages])
        except RunError as error:
            return str(error)
        if not _is_asked():
            library.hotloop_arena_uninstall()
            return "torch has another allocator than its own for CPU tensors"
        return None


tensor_arena = TensorArena


@functools.cache
def unavailable_reason() -> str | None:
    """Why no tensors can come from the arena here, in one line; ``None``: they can."""
    missing = kernels.unavailable_reason()
    if missing is None:
        try:
            kernels.call("hotloop_arena_check")
        except RunError as error:
            missing = str(error)
    return missing


@functools.cache
def _is_asked() -> bool:
    """Whether torch's allocator, once hooked, asks the arena's side for memory; tried once."""
    # A storage, not a tensor: inside a fake mode tensors have no memory.
    torch.UntypedStorage(1, device="cpu")
    return bool(kernels.library().hotloop_arena_is_asked())


def _default_reserve_bytes() -> int:
    """Four times the physical memory; at most half of the address space still allowed."""
    import resource

    try:
        wanted = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        wanted = 64 * GIB
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            used = 0
        wanted = min(wanted, max(_LEAST_BYTES, (limit - used) // 2))
    return wanted
