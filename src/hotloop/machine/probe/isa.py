"""Processor model and instruction sets, from ``/proc/cpuinfo`` (x86, Arm)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .tree import Tree, parse_int

# Name in the kernel's list -> name used here. Only what changes which kernel is fastest.
INSTRUCTION_SETS = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "amx_fp16": "amx_fp16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "sve": "sve",
    "sve2": "sve2",
    "bf16": "bf16",
    "i8mm": "i8mm",
}

# Arm kernels print numbers, not names. Part numbers: arch/arm64/include/asm/cputype.h.
_ARM_PARTS = {
    (0x41, 0xD03): "Arm Cortex-A53",
    (0x41, 0xD05): "Arm Cortex-A55",
    (0x41, 0xD08): "Arm Cortex-A72",
    (0x41, 0xD0B): "Arm Cortex-A76",
    (0x41, 0xD0C): "Arm Neoverse-N1",
    (0x41, 0xD40): "Arm Neoverse-V1",
    (0x41, 0xD49): "Arm Neoverse-N2",
    (0x41, 0xD4F): "Arm Neoverse-V2",
    (0x41, 0xD84): "Arm Neoverse-V3",
    (0x41, 0xD8E): "Arm Neoverse-N3",
    (0xC0, 0xAC3): "Ampere-1",
}


@dataclass(frozen=True)
class CpuInfo:
    """What ``/proc/cpuinfo`` says.

    Attributes:
        model: name of the processor, ``None`` when unknown.
        flags: the kernel's feature names that every CPU has; ``None`` when it lists none.
        packages: ``(physical id, core id)`` by CPU number; each ``None`` when not given.
        architecture: ``"x86_64"`` or ``"aarch64"`` where the fields tell, else ``None``.
    """

    model: str | None = None
    flags: frozenset[str] | None = None
    packages: Mapping[int, tuple[int | None, int | None]] = field(default_factory=dict)
    architecture: str | None = None


def read_cpuinfo(tree: Tree) -> CpuInfo:
    """Parse ``/proc/cpuinfo``; every field of the result is empty when it is missing."""
    models: list[str] = []
    flag_lines: set[str] = set()
    packages: dict[int, tuple[int | None, int | None]] = {}
    architecture = None
    for block in (tree.text("/proc/cpuinfo") or "").split("\n\n"):
        fields = {}
        for line in block.splitlines():
            name, colon, value = line.partition(":")
            if colon:
                fields[name.strip()] = value.strip()
        cpu = parse_int(fields.get("processor"))
        if cpu is None or cpu < 0:
            continue
        packages[cpu] = parse_int(fields.get("physical id")), parse_int(fields.get("core id"))
        if (model := fields.get("model name") or _arm_model(fields)) and model not in models:
            models.append(model)
        flags = fields.get("flags") or fields.get("Features")
        if flags is not None:
            flag_lines.add(flags)
        if "CPU implementer" in fields and fields.get("CPU architecture") == "8":
            architecture = "aarch64"
        elif " lm " in f" {flags} ":
            architecture = "x86_64"
    common = [frozenset(line.split()) for line in flag_lines]
    return CpuInfo(
        model=" + ".join(models) or None,
        flags=frozenset.intersection(*common) if common else None,
        packages=packages,
        architecture=architecture,
    )


def read_isa(cpuinfo: CpuInfo) -> tuple[str, ...]:
    """Instruction sets that matter here, in a fixed order; empty when the kernel lists none."""
    flags = cpuinfo.flags or frozenset()
    return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)


def _arm_model(fields: Mapping[str, str]) -> str | None:
    try:
        maker, part = int(fields["CPU implementer"], 16), int(fields["CPU part"], 16)
    except (KeyError, ValueError):
        return None
    return _ARM_PARTS.get((maker, part), f"Arm implementer {maker:#x} part {part:#x}")
