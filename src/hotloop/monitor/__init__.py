"""What a run does to the machine, and what may help.

- ``PerformanceMonitor`` (``monitor.py``): collects, in a ``Trainer`` or any loop.
- ``PerformanceReport`` and its parts (``metrics.py``), ``Optimization`` (``optimization.py``):
  plain values.
- ``suggest`` (``rules/``): a pure function of a report and a machine.
- ``prometheus.py``, ``sinks.py``: where reports go while a run is under way.
- ``process.py``: resident memory, its peak, page faults and CPU time of this process.

Each name is imported on first use: who wants an ``Optimization`` does not wait for the monitor.
"""

from typing import TYPE_CHECKING

from ..lazy import names_in

if TYPE_CHECKING:
    from .metrics import (
        CacheLevel,
        CacheStats,
        CoreUse,
        CpuStats,
        HotSpot,
        MemoryStats,
        OtherProcess,
        PerformanceReport,
        Sample,
        StepTimes,
        ThreadUse,
        Work,
        WorkerUse,
    )
    from .monitor import PerformanceMonitor
    from .optimization import Change, Evidence, Optimization, Proof
    from .process import (
        ProcessUsage,
        peak_resident_bytes,
        reset_peak_resident,
        resident_bytes,
    )
    from .rules import suggest

_MODULE_OF = {
    "CacheLevel": "metrics",
    "CacheStats": "metrics",
    "Change": "optimization",
    "CoreUse": "metrics",
    "CpuStats": "metrics",
    "Evidence": "optimization",
    "HotSpot": "metrics",
    "MemoryStats": "metrics",
    "Optimization": "optimization",
    "OtherProcess": "metrics",
    "PerformanceMonitor": "monitor",
    "PerformanceReport": "metrics",
    "ProcessUsage": "process",
    "Proof": "optimization",
    "Sample": "metrics",
    "StepTimes": "metrics",
    "ThreadUse": "metrics",
    "Work": "metrics",
    "WorkerUse": "metrics",
    "peak_resident_bytes": "process",
    "reset_peak_resident": "process",
    "resident_bytes": "process",
    "suggest": "rules",
}

__all__ = [
    "CacheLevel",
    "CacheStats",
    "Change",
    "CoreUse",
    "CpuStats",
    "Evidence",
    "HotSpot",
    "MemoryStats",
    "Optimization",
    "OtherProcess",
    "PerformanceMonitor",
    "PerformanceReport",
    "ProcessUsage",
    "Proof",
    "Sample",
    "StepTimes",
    "ThreadUse",
    "Work",
    "WorkerUse",
    "peak_resident_bytes",
    "reset_peak_resident",
    "resident_bytes",
    "suggest",
]


__getattr__ = names_in(__name__, _MODULE_OF)
