"""``Settings``: all that a launched process must know, in one environment variable.

Plain values and the standard library only: each Python process that is started reads this, before
anything else.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

VARIABLE = "HOTLOOP_RUN"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do inside, decided by ``changes.decide``.

    Attributes:
        pid: the process that is the script; its Python children are others. 0: the first to read
            this.
        prefix: ``sys.prefix`` of the interpreter that this is for.
        started_s: monotonic clock when the command began.
        num_ranks: processes under torchrun; ``None``: one, without it.
        environment: variables set for the time until torch is loaded.
        environment_before: what these were; ``None``: not set.
        cpu_ids: CPUs of each rank (one entry without ranks); empty: left to the kernel.
        numa_policy: ``"default"``: left. numa_nodes: nodes of each rank.
        mallopt: glibc's ``mallopt`` parameters by number.
        matmul: route products. optimizer: fused Adam. operators: take convolutions and poolings
            over. data: read batches at once.
        fingerprint: of the machine. usable_cpus: threads that run at once on it.
        bfloat16: whether it multiplies bfloat16; ``None``: not known.
        report: print the report. report_path: write it there as JSON.
        lines: what was changed, for the report.
    """

    pid: int
    prefix: str
    started_s: float = 0.0
    num_ranks: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    environment_before: dict[str, str | None] = field(default_factory=dict)
    cpu_ids: tuple[tuple[int, ...], ...] = ()
    numa_policy: str = "default"
    numa_nodes: tuple[tuple[int, ...], ...] = ()
    mallopt: dict[str, int] = field(default_factory=dict)
    matmul: bool = False
    optimizer: bool = False
    operators: bool = False
    data: bool = False
    fingerprint: str | None = None
    usable_cpus: int | None = None
    bfloat16: bool | None = None
    num_threads: int | None = None
    report: bool = False
    report_path: str | None = None
    lines: tuple[str, ...] = ()

    def dumps(self) -> str:
        """As text for the environment."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def loads(cls, text: str) -> Settings:
        """What ``dumps`` wrote.

        Raises:
            ValueError, TypeError: damaged, or of another version.
        """
        values: dict[str, Any] = json.loads(text)
        for name in ("cpu_ids", "numa_nodes"):
            values[name] = tuple(tuple(part) for part in values[name])
        values["lines"] = tuple(values["lines"])
        return cls(**values)
