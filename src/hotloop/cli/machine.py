"""``hotloop machine``: what this machine is, what it can do, and what was measured on it before."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import kernels
from ..errors import InputError
from ..machine import cache_dir, ceilings_cache
from ..machine.affinity import format_cpus
from ..measure import Machine, Winner, winners
from ..units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from ..machine import Ceilings, Measurement

NAME = "machine"

_CACHE_SUFFIX = {"data": "d", "instruction": "i", "unified": "", None: ""}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="what this machine is and what it can do",
        description="What this machine is, as far as this process may use it.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--ceilings",
        action="store_true",
        help="also the best rates of matrix products and memory, measured in under 20 s and kept",
    )
    parser.add_argument(
        "--remeasure", action="store_true", help="with --ceilings: measure again, whatever is kept"
    )
    parser.add_argument(
        "--cache", action="store_true", help="what was chosen by measurement before, and is reused"
    )
    parser.add_argument(
        "--clear-cache", action="store_true", help="forget that, and the kept ceilings"
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="read a copy of another machine's files below DIR",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the machine; returns the exit code.

    Raises:
        InputError: ``--root`` is no folder, or goes with what is asked of this machine alone.
    """
    root: Path = args.root
    if args.cache or args.clear_cache:
        if args.ceilings or args.remeasure or root != Path("/") or args.cache == args.clear_cache:
            raise InputError(
                "--cache and --clear-cache stand alone", next_step="give one of them, and --json"
            )
        return _clear_cache(args) if args.clear_cache else _show_cache(args)
    if not root.is_dir():
        raise InputError("--root must be a folder", got=root, next_step="leave --root out")
    wants_ceilings = args.ceilings or args.remeasure
    if wants_ceilings and root.resolve() != Path("/"):
        raise InputError(
            "--ceilings measures the machine it runs on",
            got=f"--root {root}",
            next_step="leave --root or --ceilings out",
        )
    machine = Machine.probe(root)
    ceilings = machine.ceilings(use_cache=not args.remeasure) if wants_ceilings else None
    if args.json:
        document: dict[str, Any] = machine.to_dict()
        document["kernels"] = kernel_facts(root)
        if ceilings is not None:
            document["ceilings"] = ceilings.to_dict()
        print(json.dumps(document, indent=2, sort_keys=True))
        return 0
    facts = kernel_facts(root)
    reason = facts["unavailable"] or facts["reason"]
    row = ("kernels", f"{facts['level'] or 'none'}: {reason}")
    print(_table([*machine_rows(machine), row]))
    if ceilings is not None:
        print()
        print(_table(ceiling_rows(ceilings)))
    return 0


def kernel_facts(root: Path) -> dict[str, str | None]:
    """Which of hotloop's libraries the machine below ``root`` loads, and why no better one."""
    here = root.resolve() == Path("/")
    choice = kernels.chosen() if here else kernels.choice_below(root)
    return {
        "level": choice.level.name if choice.level else None,
        "reason": choice.reason,
        "unavailable": kernels.unavailable_reason() if here else None,
    }


def _show_cache(args: argparse.Namespace) -> int:
    found = winners.listed()
    if args.json:
        document = [{"machine": machine, **winner.to_dict()} for machine, winner in found]
        print(json.dumps({"winners": document}, indent=2, sort_keys=True))
        return 0
    for machine, winner in found:
        print("\n".join(winner_lines(machine, winner)))
    print(f"{_count(len(found), 'winner')} in {cache_dir()}")
    return 0


def _clear_cache(args: argparse.Namespace) -> int:
    count, ceilings = winners.clear(), ceilings_cache.clear()
    if args.json:
        print(json.dumps({"winners": count, "ceilings": ceilings}))
    else:
        print(f"forgot {_count(count, 'winner')} and the ceilings of {_count(ceilings, 'machine')}")
    return 0


def winner_lines(machine: str, winner: Winner) -> list[str]:
    """Question and answer, seconds of the candidates, and what it rests on."""
    answer = winner.answer if isinstance(winner.answer, str) else json.dumps(winner.answer)
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(winner.saved_at_s))
    quiet = "" if winner.quiet else ", beside a busy neighbour: measured again in the next run"
    seconds = sorted(winner.seconds.items(), key=lambda item: item[1])
    lines = [f"{winner.question}: {answer}"]
    lines += [f"    {format_seconds(took_s):>9}  {name}" for name, took_s in seconds]
    rests = winners.versions_text(winner.versions)
    return [*lines, f"    {saved}, machine {machine}, {rests}{quiet}"]


def machine_rows(machine: Machine) -> list[tuple[str, str]]:
    """Label and text of each line about the machine. A label is empty on a further line."""
    rows = [
        ("processor", machine.cpu_model or "unknown"),
        ("system", _system(machine)),
        ("CPUs", _cpus(machine)),
        ("usable", _usable(machine)),
        ("instructions", " ".join(machine.isa) or "none known"),
    ]
    rows += _labelled("caches", _caches(machine) or ["unknown"])
    rows += _labelled("NUMA nodes", _nodes(machine) or ["unknown"])
    memory = machine.memory
    rows.append(
        (
            "memory",
            f"{format_bytes(memory.total_bytes)}, {format_bytes(memory.available_bytes)} available",
        )
    )
    if memory.limit_bytes is not None:
        used = format_bytes(memory.limit_used_bytes)
        rows.append(("", f"limited to {format_bytes(memory.limit_bytes)}, {used} of it used"))
    if memory.swap_total_bytes != 0:
        total, free = format_bytes(memory.swap_total_bytes), format_bytes(memory.swap_free_bytes)
        rows.append(("swap", f"{total}, {free} free"))
    rows += [
        ("huge pages", _huge_pages(machine)),
        ("allocator", machine.allocator or "unknown"),
        ("TEE", _tee(machine)),
        ("sandboxes", ", ".join(machine.enclave_tools) or "none found"),
    ]
    devices = Counter(
        (device.name or f"{device.vendor or 'unknown'} {device.kind}", device.memory_bytes)
        for device in machine.accelerators
    )
    texts = [
        (f"{count} x " if count > 1 else "") + name + (f", {format_bytes(size)}" if size else "")
        for (name, size), count in devices.items()
    ]
    rows += _labelled("accelerators", texts or ["none seen"])
    return rows


def ceiling_rows(ceilings: Ceilings) -> list[tuple[str, str]]:
    """Label and text of each line about the measured rates."""
    rows = [
        (
            f"{c.dtype} product",
            f"{_rate(c.flop_per_s, 'FLOP')}  {_threads(c.num_threads):<11} {c.library} "
            f"({c.route}), {c.size} x {c.size}",
        )
        for c in sorted(ceilings.matmul, key=lambda c: (c.dtype != "float32", c.num_threads))
    ]
    rows += [
        (
            f"memory {c.kind}",
            f"{_rate(c.bytes_per_s, 'B')}  {_threads(c.num_threads):<11} "
            f"arrays of {format_bytes(c.array_bytes)}",
        )
        for c in ceilings.bandwidth
    ]
    if not ceilings.bandwidth:
        rows.append(("memory", "not measured: too little memory is free for arrays past the cache"))
    rows.append(
        (
            "measured",
            f"with torch {ceilings.torch_version or 'unknown'} in "
            f"{format_seconds(ceilings.wall_s)}; median, least to greatest, number of timings",
        )
    )
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def _labelled(label: str, texts: list[str]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", text) for i, text in enumerate(texts)]


def _count(number: int | None, noun: str) -> str:
    if number is None:
        return f"unknown {noun}s"
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _system(machine: Machine) -> str:
    kind = {True: "virtual machine", False: "bare metal", None: None}[machine.is_virtual]
    kernel = f"kernel {machine.kernel}" if machine.kernel else None
    known = (machine.architecture, machine.platform, kind, kernel)
    return ", ".join(word for word in known if word) or "unknown"


def _cpus(machine: Machine) -> str:
    counts = (
        _count(machine.sockets, "socket"),
        _count(machine.physical_cores, "core"),
        _count(machine.logical_cpus, "logical CPU"),
    )
    kinds = Counter(core.kind for core in machine.cores if core.kind is not None)
    hybrid = " and ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), reverse=True))
    return ", ".join(counts) + (f" ({hybrid} cores)" if hybrid else "")


def _usable(machine: Machine) -> str:
    listed = f": {format_cpus(machine.cpu_ids)}" if machine.cpu_ids else ""
    allowed = f"{_count(len(machine.cpu_ids), 'CPU')} allowed{listed}"
    quota = "no quota" if machine.cpu_quota is None else f"quota of {machine.cpu_quota:g} CPUs"
    return f"{_count(machine.usable_cpus, 'thread')} at once; {allowed}; {quota}"


def _caches(machine: Machine) -> list[str]:
    groups = Counter(
        (c.level, c.kind, c.size_bytes, len(c.shared_by), c.line_bytes) for c in machine.caches
    )
    texts = []
    for (level, kind, size_bytes, sharers, line_bytes), count in sorted(
        groups.items(), key=lambda item: (item[0][0], item[0][1] or "", item[0][2] or 0)
    ):
        name = f"L{level}{_CACHE_SUFFIX[kind]}"
        shared = f", each shared by {sharers} CPUs" if sharers > 1 else ""
        line = f", lines of {line_bytes} B" if line_bytes is not None else ""
        texts.append(f"{name:<3} {count} x {format_bytes(size_bytes)}{shared}{line}")
    return texts


def _nodes(machine: Machine) -> list[str]:
    texts = []
    for node in machine.numa_nodes:
        cpus = f"CPUs {format_cpus(node.cpu_ids)}" if node.cpu_ids else "no CPUs"
        # The distance to itself tells nothing.
        far = f", distances {' '.join(map(str, node.distances))}" if len(node.distances) > 1 else ""
        texts.append(f"{node.id}: {cpus}, {format_bytes(node.memory_total_bytes)}{far}")
    return texts


def _huge_pages(machine: Machine) -> str:
    memory = machine.memory
    transparent = f"transparent: {memory.transparent_huge_pages or 'unknown'}"
    if memory.huge_pages_total is None:
        return f"{transparent}; reserved: unknown"
    if memory.huge_pages_total == 0:
        return f"{transparent}; reserved: none"
    free = "unknown" if memory.huge_pages_free is None else memory.huge_pages_free
    size = format_bytes(memory.huge_page_bytes)
    return f"{transparent}; reserved: {memory.huge_pages_total} of {size}, {free} free"


def _tee(machine: Machine) -> str:
    here = {None: "unknown", "none": "not inside one"}.get(machine.tee, f"inside {machine.tee}")
    hosted = f"; can start {', '.join(machine.tee_hosted)}" if machine.tee_hosted else ""
    return here + hosted


def _rate(rate: Measurement, noun: str) -> str:
    least, greatest = format_rate(rate.min, noun), format_rate(rate.max, noun)
    number, _, unit = least.partition(" ")
    if greatest.endswith(f" {unit}"):  # the unit is said once where it is the same
        least = number
    return f"{format_rate(rate.median, noun):>13}  {f'{least} to {greatest}':<24} n={rate.n}"


def _threads(count: int) -> str:
    return _count(count, "thread")
