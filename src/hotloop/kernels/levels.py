"""Levels of instruction set that the library is built for, and which of them a processor can run.

The levels of x86-64 are those of the x86-64 psABI (version 1.0, section 3.1.1, "micro-architecture
levels"); the last one adds products of bfloat16. Linux lists a feature in ``/proc/cpuinfo`` only
where the operating system has switched it on too (wide registers are saved on a switch).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Missing features that a reason names.
_NAMED = 3


@dataclass(frozen=True)
class Level:
    """One library.

    Attributes:
        name: as in the file's name. architecture: as ``uname -m``.
        needs: features, by the names of ``/proc/cpuinfo``.
    """

    name: str
    architecture: str
    needs: frozenset[str]


# The best one of an architecture first.
LEVELS = (
    Level("x86-64-v4-bf16", "x86_64", _V4 | {"avx512_bf16"}),
    Level("x86-64-v4", "x86_64", _V4),
    Level("x86-64-v3", "x86_64", _V3),
    Level("x86-64-v2", "x86_64", _V2),
    Level("aarch64", "aarch64", frozenset({"asimd"})),
)


@dataclass(frozen=True)
class Choice:
    """Which level a machine runs, and why no better one; ``level`` is ``None`` where none does."""

    level: Level | None
    reason: str


def choose(architecture: str | None, features: Set[str]) -> Choice:
    """The best level for a processor.

    Args:
        architecture: as ``uname -m``. features: of every CPU, as ``/proc/cpuinfo`` names them.
    """
    candidates = [level for level in LEVELS if level.architecture == architecture]
    if not candidates:
        return Choice(None, f"hotloop has no kernels for {architecture or 'this processor'}")
    better = None
    for level in candidates:
        missing = sorted(level.needs - features)
        if not missing:
            if better is None:
                return Choice(level, "the highest level there is")
            return Choice(level, _needs(*better))
        better = level, missing
    assert better is not None
    return Choice(None, _needs(*better))


def _needs(level: Level, missing: list[str]) -> str:
    named = ", ".join(missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
    return f"{level.name} needs {named}"
