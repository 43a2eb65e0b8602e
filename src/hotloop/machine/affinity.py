"""Which CPU each thread runs on: the choice (``ThreadAffinity``), and pinning that restores."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import PlanError, RunError
from .probe.tree import parse_cpu_list

if TYPE_CHECKING:
    from .machine import Machine

KINDS = ("none", "compact", "spread")
T = TypeVar("T")


@dataclass(frozen=True)
class ThreadAffinity:
    """Where threads run.

    - ``none``: the kernel decides.
    - ``compact``: threads close together: one after another on the cores that share a
      last-level cache, then on the next cache of the same NUMA node, the next node, the next
      socket.
    - ``spread``: threads far apart: sockets in turn, in each its nodes in turn, in each its
      last-level caches in turn. More memory bandwidth and cache for few threads.
    - a list of CPUs, such as ``0,2,4-6``: thread i runs on the i-th.

    Compact and spread give every physical core one thread before any gets a second, and take
    performance cores before efficiency cores.

    Attributes:
        kind: ``"none"``, ``"compact"``, ``"spread"`` or ``"list"``.
        cpu_ids: the CPUs of a list, in order; empty for the other kinds.

    Raises:
        PlanError: an unknown kind, or a list that is empty or names a CPU twice.
    """

    kind: str = "none"
    cpu_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "list") or (self.kind == "list") != bool(self.cpu_ids):
            raise _bad_affinity(self.kind)
        if len(set(self.cpu_ids)) < len(self.cpu_ids) or min(self.cpu_ids, default=0) < 0:
            raise PlanError(
                "thread_affinity must name each CPU once",
                got=",".join(map(str, self.cpu_ids)),
                next_step="list different CPUs, such as 0,2,4-6",
            )

    @classmethod
    def parse(cls, text: str) -> ThreadAffinity:
        """The affinity that ``text`` names.

        Raises:
            PlanError: neither none, compact, spread nor a list of CPUs.
        """
        word = text.strip().lower()
        if word in KINDS:
            return cls(word)
        cpu_ids: list[int] = []
        for part in word.split(","):
            # The order given is kept, so each part is parsed alone.
            numbers = parse_cpu_list(part)
            if not numbers:
                raise _bad_affinity(text)
            cpu_ids.extend(numbers)
        return cls("list", tuple(cpu_ids))

    def __str__(self) -> str:
        if self.kind != "list":
            return self.kind
        runs: list[list[int]] = []
        for cpu in self.cpu_ids:
            if runs and cpu == runs[-1][-1] + 1:
                runs[-1].append(cpu)
            else:
                runs.append([cpu])
        return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)

    def cpus(
        self, machine: Machine, num_threads: int, *, knob: str = "num_threads"
    ) -> tuple[int, ...]:
        """The CPU of thread 0, 1, ..., ``num_threads - 1``; empty for ``none``.

        Args:
            knob: what the message calls ``num_threads``.

        Raises:
            PlanError: more threads than CPUs, or a listed CPU that this process may not use.
        """
        if self.kind == "none":
            return ()
        if self.kind == "list":
            outside = [cpu for cpu in self.cpu_ids if cpu not in machine.cpu_ids]
            if outside:
                raise PlanError(
                    "thread_affinity must name CPUs this process may use",
                    got=f"CPU {outside[0]}",
                    next_step=f"choose among {format_cpus(machine.cpu_ids) or 'none'}",
                )
            order = self.cpu_ids
        else:
            order = placement_order(machine, spread=self.kind == "spread")
        if num_threads > len(order):
            raise PlanError(
                f"{knob} must be at most the {len(order)} CPUs of thread_affinity {self}",
                got=num_threads,
                next_step=f"pass --{knob.replace('_', '-')} {max(1, len(order))} or "
                "--thread-affinity none",
            )
        return order[:num_threads]


def format_cpus(cpu_ids: Iterable[int]) -> str:
    """CPU numbers in the kernel's list format, such as ``"0-3,8"``."""
    numbers = tuple(sorted(set(cpu_ids)))
    return str(ThreadAffinity("list", numbers)) if numbers else ""


def placement_order(machine: Machine, *, spread: bool) -> tuple[int, ...]:
    """Every usable CPU, in the order in which threads take them."""
    usable = set(machine.cpu_ids)
    cache_of = {
        cpu: cache.shared_by[0] for cache in machine.last_level_caches for cpu in cache.shared_by
    }
    # One entry per usable CPU: its tier (which sibling, which kind of core) and its place.
    tiers: dict[tuple[int, bool], list[tuple[int, int, int, int]]] = {}
    known: set[int] = set()
    for core in machine.cores:
        siblings = [cpu for cpu in core.cpu_ids if cpu in usable]
        known.update(siblings)
        for rank, cpu in enumerate(siblings):
            place = (_number(core.socket), _number(core.node), cache_of.get(cpu, -1), cpu)
            tiers.setdefault((rank, core.kind == "efficiency"), []).append(place)
    for cpu in sorted(usable - known):
        tiers.setdefault((0, False), []).append((-1, -1, cache_of.get(cpu, -1), cpu))
    order: list[int] = []
    for tier in sorted(tiers):
        places = sorted(tiers[tier])
        order.extend(place[-1] for place in (_in_turn(places, depth=0) if spread else places))
    return tuple(order)


def _number(value: int | None) -> int:
    return -1 if value is None else value


def _in_turn(places: Sequence[tuple[int, ...]], depth: int) -> list[tuple[int, ...]]:
    """Places taken in turn from each group of equal ``place[depth]``, and so on inside each."""
    if depth == 3:
        return list(places)
    groups = _grouped(places, lambda place: place[depth])
    inner = [_in_turn(group, depth + 1) for group in groups]
    longest = max(map(len, inner), default=0)
    return [group[i] for i in range(longest) for group in inner if i < len(group)]


def _grouped(items: Iterable[T], key: Callable[[T], int]) -> list[list[T]]:
    groups: dict[int, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _bad_affinity(got: str) -> PlanError:
    return PlanError(
        "thread_affinity must be none, compact, spread or a list of CPUs",
        got=repr(got),
        next_step="write --thread-affinity compact, or CPUs such as 0,2,4-6",
    )


@contextlib.contextmanager
def pinned(cpu_ids: Iterable[int]) -> Iterator[None]:
    """Confine all threads of this process to these CPUs; on leaving, each has its old mask again.

    Threads started inside inherit the confinement and afterwards get the mask that the entering
    thread had, unless they chose another for themselves. An empty list changes nothing.

    Raises:
        RunError: the system cannot pin, or the kernel refuses these CPUs.
    """
    wanted = frozenset(cpu_ids)
    if not wanted:
        yield
        return
    _require_affinity_calls()
    own = os.sched_getaffinity(0)
    found: dict[int, set[int]] = {}
    try:
        # A thread not yet confined may start another meanwhile, so look until none is new.
        while new := [thread for thread in _thread_ids() if thread not in found]:
            for thread in new:
                with contextlib.suppress(ProcessLookupError):
                    found[thread] = os.sched_getaffinity(thread)
                    _set_mask(thread, wanted)
        yield
    finally:
        for thread in _thread_ids():
            with contextlib.suppress(ProcessLookupError):
                if thread in found:
                    os.sched_setaffinity(thread, found[thread])
                elif os.sched_getaffinity(thread) == wanted:
                    os.sched_setaffinity(thread, own)


@contextlib.contextmanager
def pinned_thread(cpu_ids: Iterable[int]) -> Iterator[None]:
    """Confine the calling thread alone to these CPUs; on leaving it has its old mask again.

    Raises:
        RunError: the system cannot pin, or the kernel refuses these CPUs.
    """
    wanted = frozenset(cpu_ids)
    if not wanted:
        yield
        return
    _require_affinity_calls()
    found = os.sched_getaffinity(0)
    _set_mask(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, found)


def give_way(steps: int) -> None:
    """Have the calling thread give way to others of this process, for good.

    Args:
        steps: of the kernel's nice values, 1 to 19; five are a third of an equal's share. Threads
            that it starts later do as it does. Nothing happens where the system knows no priority
            of a single thread.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), steps)


def _thread_ids() -> list[int]:
    try:
        return sorted(int(name) for name in os.listdir("/proc/self/task"))
    except OSError:
        return [0]  # no /proc: the calling thread


def _set_mask(thread: int, cpu_ids: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(thread, cpu_ids)
        # The kernel drops CPUs that the cpuset excludes without a word.
        refused = cpu_ids - os.sched_getaffinity(thread)
        reason = "left out by the kernel"
    except ProcessLookupError:
        raise
    except (OSError, ValueError, OverflowError) as error:
        refused, reason = cpu_ids, str(error)
    if refused:
        raise RunError(
            "threads can be pinned only to CPUs that the kernel allows this process",
            got=f"CPUs {format_cpus(refused)}: {reason}",
            next_step="see `hotloop machine`, or use --thread-affinity none",
        )


def _require_affinity_calls() -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise RunError(
            "threads cannot be pinned on this system", next_step="use --thread-affinity none"
        )
