"""What a run did to the machine.

process  resident memory, peak, page faults and CPU time of this process
"""

from .process import (
    ProcessUsage,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
)

__all__ = ["ProcessUsage", "peak_resident_bytes", "reset_peak_resident", "resident_bytes"]
