"""The machine, as records name it."""

from typing import Any

from hotloop.machine import Machine
from hotloop.train.report import versions


def about() -> dict[str, Any]:
    """``machine``, what of it decides a figure, and ``versions`` of a record made here and now."""
    machine = Machine.probe()
    summary = {
        "fingerprint": machine.fingerprint(),
        "cpu_model": machine.cpu_model,
        "usable_cpus": machine.usable_cpus,
        "memory_total_bytes": machine.memory.total_bytes,
        "tee": machine.tee,
        "allocator": machine.allocator,
    }
    return {"machine": summary, "versions": versions()}
