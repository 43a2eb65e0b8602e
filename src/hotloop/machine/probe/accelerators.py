"""Accelerators that a driver shows: NVIDIA and AMD GPUs, the kernel's accel class, AWS Neuron."""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Tree, parse_fields, parse_int

_VENDORS = {"0x8086": "intel", "0x1002": "amd", "0x1022": "amd", "0x1da3": "habana"}
KFD_NODES = "/sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        vendor: ``"nvidia"``, ``"amd"``, ``"intel"``, ``"habana"``, ``"aws"``; ``None`` unknown.
        kind: ``"gpu"`` or ``"accel"`` (a matrix or neural processor).
        name: the driver's name for it, ``None`` when unknown.
        memory_bytes: its own memory, ``None`` when unknown.
        bus: PCI address or device file, ``None`` when unknown.
    """

    vendor: str | None
    kind: str
    name: str | None
    memory_bytes: int | None
    bus: str | None


def read_accelerators(tree: Tree) -> tuple[Accelerator, ...]:
    """All devices found; an empty tuple when no driver shows one."""
    return (*_nvidia(tree), *_amd(tree), *_accel_class(tree), *_neuron(tree))


def _nvidia(tree: Tree) -> list[Accelerator]:
    folder = "/proc/driver/nvidia/gpus"
    found = []
    for address in tree.names(folder):
        fields = parse_fields(tree.text(f"{folder}/{address}/information"))
        found.append(Accelerator("nvidia", "gpu", fields.get("Model") or None, None, address))
    return found


def _amd(tree: Tree) -> list[Accelerator]:
    found = []
    for number in tree.numbered(KFD_NODES, ""):
        folder = f"{KFD_NODES}/{number}"
        # CPUs are nodes of this list too; they have no SIMD units.
        if not (_properties(tree, f"{folder}/properties").get("simd_count") or 0):
            continue
        banks = [
            _properties(tree, f"{folder}/mem_banks/{bank}/properties")
            for bank in tree.numbered(f"{folder}/mem_banks", "")
        ]
        # Heap types 1 and 2 are the device's own memory (include/uapi/linux/kfd_sysfs.h).
        sizes = [b.get("size_in_bytes") for b in banks if b.get("heap_type") in (1, 2)]
        known = [size for size in sizes if size is not None]
        name = tree.text(f"{folder}/name") or None
        found.append(Accelerator("amd", "gpu", name, sum(known) if known else None, None))
    return found


def _properties(tree: Tree, path: str) -> dict[str, int | None]:
    words = (line.split() for line in (tree.text(path) or "").splitlines())
    return {pair[0]: parse_int(pair[1]) for pair in words if len(pair) == 2}


def _accel_class(tree: Tree) -> list[Accelerator]:
    found = []
    for number in tree.numbered("/sys/class/accel", "accel"):
        device = f"/sys/class/accel/accel{number}/device"
        vendor = _VENDORS.get(tree.text(f"{device}/vendor") or "")
        uevent = dict(
            line.partition("=")[::2] for line in (tree.text(f"{device}/uevent") or "").splitlines()
        )
        name = uevent.get("DRIVER") or None
        bus = uevent.get("PCI_SLOT_NAME") or f"/dev/accel/accel{number}"
        found.append(Accelerator(vendor, "accel", name, None, bus))
    return found


def _neuron(tree: Tree) -> list[Accelerator]:
    return [
        Accelerator("aws", "accel", "neuron", None, f"/dev/neuron{number}")
        for number in tree.numbered("/dev", "neuron")
    ]
