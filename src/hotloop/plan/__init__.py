"""``Plan``: how a run uses the machine, never what it computes.

Two plans give the same mathematics; model, batch size, learning rate and seed belong to the
caller. Each knob is declared once (``knob.py``): its default, rule, flag and help text. The
command-line flags, the file format and the error messages are generated from that.
"""

from .flags import add_plan_flags, flags, plan_from_flags
from .knob import AUTO
from .parts import CheckpointConfig, CpuConfig, MemoryConfig, NumaConfig, ParallelConfig, StepConfig
from .plan import Plan

__all__ = [
    "AUTO",
    "CheckpointConfig",
    "CpuConfig",
    "MemoryConfig",
    "NumaConfig",
    "ParallelConfig",
    "Plan",
    "StepConfig",
    "add_plan_flags",
    "flags",
    "plan_from_flags",
]
