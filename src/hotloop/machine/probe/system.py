"""Kernel, architecture and whether this is a virtual machine."""

from __future__ import annotations

from .isa import CpuInfo
from .tree import Tree

_DMI = "/sys/class/dmi/id"


def read_kernel(tree: Tree) -> str | None:
    """Release of the running kernel, such as ``"6.8.0-45-generic"``."""
    named = tree.text("/proc/sys/kernel/osrelease")
    if named or not tree.is_live:
        return named or None
    import platform

    return platform.release() or None


def read_architecture(tree: Tree, cpuinfo: CpuInfo) -> str | None:
    """``"x86_64"``, ``"aarch64"``, ... as ``uname -m`` would print it."""
    # The file is there from Linux 6.1 on.
    named = tree.text("/proc/sys/kernel/arch") or cpuinfo.architecture
    if named or not tree.is_live:
        return named or None
    import platform

    return platform.machine() or None


def read_is_virtual(tree: Tree, cpuinfo: CpuInfo) -> bool | None:
    """Whether a hypervisor is underneath; ``None`` on processors that do not say (Arm)."""
    if tree.text("/sys/hypervisor/type"):
        return True
    if cpuinfo.flags is None or cpuinfo.architecture == "aarch64":
        return None
    return "hypervisor" in cpuinfo.flags


def read_platform(tree: Tree) -> str | None:
    """Maker and product in the firmware's words, such as ``"Amazon EC2 c7g.4xlarge"``."""
    words = (tree.text(f"{_DMI}/sys_vendor"), tree.text(f"{_DMI}/product_name"))
    return " ".join(word for word in words if word) or None
