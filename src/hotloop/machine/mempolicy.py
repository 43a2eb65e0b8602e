"""The kernel's memory policy of a thread, by system call: ``set_mempolicy(2)``."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import RunError

# Mode numbers: include/uapi/linux/mempolicy.h.
MODES = {"default": 0, "bind": 2, "interleave": 3, "local": 4}
_FLAG_BITS = 0xE000  # flags that the kernel keeps in the mode word

# (get_mempolicy, set_mempolicy): arch/x86/entry/syscalls/syscall_64.tbl and, for the others,
# include/uapi/asm-generic/unistd.h.
_SYSCALLS = {
    "x86_64": (239, 238),
    "aarch64": (236, 237),
    "riscv64": (236, 237),
}

_MASK_BITS = 1024
_WORD_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_Mask = ctypes.c_ulong * (_MASK_BITS // _WORD_BITS)


@dataclass(frozen=True)
class MemoryPolicy:
    """Where new pages of the calling thread come from.

    Attributes:
        mode: the kernel's mode word, flags included.
        nodes: NUMA nodes it names, ascending.
    """

    mode: int
    nodes: tuple[int, ...] = ()

    @property
    def name(self) -> str | None:
        """``"default"``, ``"local"``, ``"bind"``, ``"interleave"``, or ``None`` for another."""
        bare = self.mode & ~_FLAG_BITS
        return next((name for name, mode in MODES.items() if mode == bare), None)


def get_memory_policy() -> MemoryPolicy:
    """The policy of the calling thread.

    Raises:
        RunError: the system has no such call, or refuses it.
    """
    mode, mask = ctypes.c_int(), _Mask()
    get, _ = _syscall_numbers()
    _call(get, "read", ctypes.byref(mode), mask, _MASK_BITS + 1, None, 0)
    nodes = (
        word * _WORD_BITS + bit
        for word, value in enumerate(mask)
        for bit in range(_WORD_BITS)
        if value >> bit & 1
    )
    return MemoryPolicy(mode.value, tuple(nodes))


def set_memory_policy(policy: MemoryPolicy) -> None:
    """Set the policy of the calling thread; threads it starts later inherit it.

    Pages already allocated stay where they are.

    Raises:
        RunError: the system has no such call, or refuses it.
    """
    _, set_ = _syscall_numbers()
    asked = f"{policy.name or policy.mode} on nodes {list(policy.nodes)}"
    if not all(0 <= node < _MASK_BITS for node in policy.nodes):
        raise _refused("set", asked, errno.EINVAL)
    # The kernel reads one bit less than the count it is given.
    mask = _mask_of(policy.nodes) if policy.nodes else None
    _call(set_, "set", policy.mode, mask, _MASK_BITS + 1 if policy.nodes else 0, asked=asked)


def _mask_of(nodes: Iterable[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = _Mask()
    for node in nodes:
        mask[node // _WORD_BITS] |= 1 << (node % _WORD_BITS)
    return mask


def _syscall_numbers() -> tuple[int, int]:
    import platform

    # A 32-bit process on a 64-bit kernel has other numbers; none is supported.
    known = platform.system() == "Linux" and ctypes.sizeof(ctypes.c_void_p) == 8
    numbers = _SYSCALLS.get(platform.machine()) if known else None
    if numbers is None:
        raise RunError(
            "the memory policy can be set on 64-bit Linux (x86_64, aarch64, riscv64) only",
            got=f"{platform.system()} {platform.machine()}",
            next_step="use --numa-policy default",
        )
    return numbers


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _call(number: int, verb: str, *arguments: object, asked: str | None = None) -> None:
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    if _libc().syscall(ctypes.c_long(number), *words) != 0:
        raise _refused(verb, asked, ctypes.get_errno())


def _refused(verb: str, asked: str | None, code: int) -> RunError:
    reason = os.strerror(code)
    if code in (errno.EPERM, errno.ENOSYS):
        # Container engines filter this call unless CAP_SYS_NICE is given.
        reason += ", often a container's system-call filter"
    return RunError(
        f"the kernel must let this process {verb} its memory policy",
        got=f"{asked}: {reason}" if asked else reason,
        next_step="use --numa-policy default, or nodes listed by `hotloop machine`",
    )
