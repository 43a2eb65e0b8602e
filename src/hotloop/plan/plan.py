"""``Plan``: every knob of a run in one frozen, validated value; to and from TOML and JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from ..errors import PlanError
from ..files import write_text_atomically
from ..machine import Ceilings, Machine
from ..machine.affinity import ThreadAffinity
from ..units import GIB
from .knob import AUTO, knobs
from .parts import (
    PARTS,
    CheckpointConfig,
    CpuConfig,
    MemoryConfig,
    NumaConfig,
    ParallelConfig,
    StepConfig,
)


@dataclass(frozen=True)
class Plan:
    """How a run uses the machine. Frozen; ``replace`` makes a changed copy.

    ``Plan()`` holds the defaults, ``Plan.auto()`` leaves the thread count to measurement,
    ``Plan.load(path)`` reads TOML or JSON.
    """

    cpu: CpuConfig = field(default_factory=CpuConfig)
    numa: NumaConfig = field(default_factory=NumaConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    step: StepConfig = field(default_factory=StepConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name, part in PARTS.items():
            if not isinstance(getattr(self, name), part):
                raise PlanError(
                    f"{name} must be a {part.__name__}",
                    got=repr(getattr(self, name)),
                    next_step=f"pass {name}=hotloop.{part.__name__}(...)",
                )

    @classmethod
    def auto(cls) -> Plan:
        """The defaults, with every choice that can be measured left to measurement."""
        return cls(cpu=CpuConfig(num_threads=AUTO))

    def resolve(self, machine: Machine, ceilings: Ceilings | None = None) -> Plan:
        """The plan with ``auto`` and ``None`` replaced by what holds on this machine.

        Args:
            machine: what there is.
            ceilings: measured rates. ``auto`` threads are the count with the best float32 matrix
                product rate; without ceilings all usable CPUs, which is a hypothesis.
        """
        values: dict[str, Any] = {}
        if self.cpu.num_threads == AUTO:
            values["cpu.num_threads"] = _fastest_threads(ceilings) or machine.usable_cpus
        if self.memory.line_bytes is None:
            values["memory.line_bytes"] = machine.line_bytes or 64
        if self.memory.enclave_overhead_bytes is None:
            inside = machine.tee not in (None, "none")
            values["memory.enclave_overhead_bytes"] = GIB // 4 if inside else 0
        return self.replace(values)

    def memory_limit_bytes(self, machine: Machine) -> int | None:
        """The least of the plan's limit, the control group's and the machine's memory."""
        known = (self.memory.limit_bytes, machine.memory.limit_bytes, machine.memory.total_bytes)
        return min((size for size in known if size is not None), default=None)

    def replace(self, values: Mapping[str, Any]) -> Plan:
        """A copy with knobs changed by dotted name: ``{"cpu.num_threads": 2}``.

        Raises:
            PlanError: no such knob, or a value breaks its rule.
        """
        document: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            part, _, key = name.partition(".")
            document.setdefault(part, {})[key] = value
        parts = dict(_read_parts(document, source="plan", base=self))
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionary: numbers, text, lists and ``None``."""
        return {
            part: {name: _plain(getattr(getattr(self, part), name)) for name, _ in knobs(kind)}
            for part, kind in PARTS.items()
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, source: str = "plan") -> Plan:
        """The plan of a nested dictionary; what it does not name keeps its default.

        Raises:
            PlanError: an unknown key (the nearest known one is named), or a value that breaks
                its rule.
        """
        return cls(**dict(_read_parts(document, source=source, base=None)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a ``.toml`` or ``.json`` file.

        Raises:
            PlanError: no such file, not readable, or not a plan.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                "a plan file must be readable text",
                got=f"{path}: {error}",
                next_step="check the path, or write one with hotloop plan --save hotloop.toml",
            ) from None
        try:
            document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except ValueError as error:
            raise PlanError(f"{path} must be valid {path.suffix or 'TOML'}", got=error) from None
        if not isinstance(document, dict):
            raise PlanError(f"{path} must hold one table of knobs", got=type(document).__name__)
        return cls.from_dict(document, source=str(path))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``.toml`` or ``.json``; the file is replaced whole or not at all.

        TOML has no null: knobs that are ``None`` are left out, which reads back as ``None``.

        Raises:
            StorageError: the file cannot be written.
        """
        path = Path(path)
        document = self.to_dict()
        if path.suffix == ".json":
            text = json.dumps(document, indent=2) + "\n"
        else:
            known = {
                part: {name: value for name, value in values.items() if value is not None}
                for part, values in document.items()
            }
            text = tomli_w.dumps(known)
        write_text_atomically(path, text)
        return path


def _fastest_threads(ceilings: Ceilings | None) -> int | None:
    measured = ceilings.matmul if ceilings is not None else ()
    rates = {m.num_threads: m.flop_per_s.max for m in measured if m.dtype == "float32"}
    best = max(rates.values(), default=0.0)
    # Within 5 %, the fewer threads: what is not faster only disturbs the data queue.
    return min((n for n, rate in rates.items() if rate >= 0.95 * best), default=None)


def _plain(value: Any) -> Any:
    if isinstance(value, ThreadAffinity):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _read_parts(
    document: Mapping[str, Any], *, source: str, base: Plan | None
) -> Iterator[tuple[str, Any]]:
    for part, values in document.items():
        if part not in PARTS:
            raise _unknown(part, list(PARTS), f"{source} has no part of this name")
        if not isinstance(values, Mapping):
            raise PlanError(f"{source}: [{part}] must be a table of knobs", got=repr(values))
        names = [name for name, _ in knobs(PARTS[part])]
        for name in values:
            if name not in names:
                raise _unknown(name, names, f"{source}: [{part}] has no knob of this name")
        if base is None:
            yield part, PARTS[part](**values)
        else:
            yield part, dataclasses.replace(getattr(base, part), **values)


def _unknown(name: str, known: list[str], rule: str) -> PlanError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return PlanError(rule, got=repr(name), next_step=hint)
