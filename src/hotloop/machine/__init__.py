"""What this machine is, what it can do, and how to pin work to it. Importing loads no torch.

- ``Machine.probe()``: what it is (``machine.py``; the readers in ``probe/``).
- ``Machine.ceilings()``: what it can do (``ceilings.py``), measured by ``hotloop.measure`` and kept
  by ``ceilings_cache.py``.
- ``ThreadAffinity``, ``pinned``, ``pinned_thread``, ``give_way`` (``affinity.py``), ``num_threads``
  (``threads.py``): threads. ``numa``: nodes and memory policy. All but ``give_way`` restore what
  they found.
- ``cache_dir()``: where measured and fetched things are kept.
- ``tcp_info``: when something last came on a connection, by the kernel's clock.
"""

from typing import TYPE_CHECKING

from ..lazy import names_in
from .cache_dir import cache_dir

if TYPE_CHECKING:
    from . import numa
    from .affinity import ThreadAffinity, give_way, pinned, pinned_thread
    from .ceilings import BandwidthCeiling, Ceilings, MatmulCeiling, Measurement
    from .machine import Machine
    from .probe.accelerators import Accelerator
    from .probe.caches import Cache
    from .probe.memory import MachineMemory
    from .probe.topology import Core, NumaNode
    from .threads import num_threads

_MODULE_OF = {
    "Accelerator": "probe.accelerators",
    "BandwidthCeiling": "ceilings",
    "Cache": "probe.caches",
    "Ceilings": "ceilings",
    "Core": "probe.topology",
    "Machine": "machine",
    "MachineMemory": "probe.memory",
    "MatmulCeiling": "ceilings",
    "Measurement": "ceilings",
    "NumaNode": "probe.topology",
    "ThreadAffinity": "affinity",
    "give_way": "affinity",
    "num_threads": "threads",
    "pinned": "affinity",
    "pinned_thread": "affinity",
}

__all__ = [
    "Accelerator",
    "BandwidthCeiling",
    "Cache",
    "Ceilings",
    "Core",
    "Machine",
    "MachineMemory",
    "MatmulCeiling",
    "Measurement",
    "NumaNode",
    "ThreadAffinity",
    "cache_dir",
    "give_way",
    "num_threads",
    "numa",
    "pinned",
    "pinned_thread",
]

__getattr__ = names_in(__name__, _MODULE_OF)
