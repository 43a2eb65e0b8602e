"""The machine, as records name it."""

from typing import Any

from hotloop.machine import Machine


def machine_summary(machine: Machine) -> dict[str, Any]:
    """What decides a figure, without the rest of the machine."""
    return {
        "fingerprint": machine.fingerprint(),
        "cpu_model": machine.cpu_model,
        "usable_cpus": machine.usable_cpus,
        "memory_total_bytes": machine.memory.total_bytes,
        "tee": machine.tee,
        "allocator": machine.allocator,
    }
