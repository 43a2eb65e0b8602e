"""``Hardware``: what measuring asks of a machine; ``Machine`` has it."""

from __future__ import annotations

from typing import Protocol

from .probe.caches import Cache
from .probe.memory import MachineMemory


class Hardware(Protocol):
    """The processors, caches and memory that this process may use; see ``Machine``."""

    @property
    def usable_cpus(self) -> int:
        """Threads that can run at once."""

    @property
    def usable_cores(self) -> int | None:
        """Physical cores of ``cpu_ids``; ``None`` when unknown."""

    @property
    def cpu_ids(self) -> tuple[int, ...]:
        """Logical CPUs this process may run on."""

    @property
    def last_level_caches(self) -> tuple[Cache, ...]:
        """The caches of the highest level."""

    @property
    def memory(self) -> MachineMemory:
        """What there is and what is left."""

    def fingerprint(self) -> str:
        """Of what determines speed."""
