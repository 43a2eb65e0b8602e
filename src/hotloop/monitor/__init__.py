"""What a run does to the machine, and what may help.

- ``PerformanceMonitor`` (``monitor.py``): collects, in a ``Trainer`` or any loop.
- ``PerformanceReport`` and its parts (``metrics.py``), ``Optimization`` (``optimization.py``):
  plain values.
- ``suggest`` (``suggest/``): a pure function of a report and a machine.
- ``prometheus.py``, ``sinks.py``: where reports go while a run is under way.
- ``process.py``: resident memory, its peak, page faults and CPU time of this process.
"""

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
from .suggest import suggest

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
