"""A seccomp filter for a sandbox, assembled here: what a training or serving process calls.

The kernel runs a classic BPF program over each system call (``seccomp(2)``,
``include/uapi/linux/filter.h``). This one ends a process of another architecture, allows a list of
calls, and answers ``ENOSYS`` to all others, so that C libraries take their older ways.
"""

from __future__ import annotations

import errno
import platform
import struct

from ..errors import InputError
from .system_calls import SYSTEM_CALLS

# include/uapi/linux/audit.h: the ELF machine, 64 bits, little endian.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# include/uapi/linux/bpf_common.h: class, size or operation, source.
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ABOVE = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# include/uapi/linux/seccomp.h
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000

# struct seccomp_data: number, architecture, instruction pointer, six arguments of 8 bytes.
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4

# include/uapi/linux/sched.h: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
NEW_NAMESPACES = 0x7E020000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
# Unix, IPv4 and IPv6: no packet, netlink or vsock sockets.
FAMILIES = (1, 2, 10)

Instruction = tuple[int, int, int, int]


def _argument_at(index: int) -> int:
    return 16 + 8 * index  # The lower half: little endian.


def build_filter(architecture: str | None = None) -> bytes:
    """The filter as ``struct sock_filter`` after another, as ``bwrap --seccomp`` reads it.

    Args:
        architecture: ``"x86_64"`` or ``"aarch64"``; this machine's when ``None``.

    Raises:
        InputError: another architecture.
    """
    architecture = architecture or platform.machine()
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"a sandbox's filter is known for {' and '.join(_ARCHITECTURES)}",
            got=architecture,
            next_step="run with --no-seccomp, which the command then tells",
        )
    column = tuple(_ARCHITECTURES).index(architecture)
    numbers = {name: pair[column] for name, pair in SYSTEM_CALLS.items()}
    known = {name: number for name, number in numbers.items() if number is not None}
    program = _prologue(architecture)
    program += _checked(known["clone"], 0, _ANY_BIT, (NEW_NAMESPACES,), errno.EPERM)
    program += _checked(known["ioctl"], 1, _EQUAL, (_TIOCSTI, _TIOCLINUX), errno.EPERM)
    program += _family(known["socket"])
    for first, last in _ranges(sorted(known.values())):
        if first == last:
            program += [(_EQUAL, 0, 1, first), (_RETURN, 0, 0, _ALLOW)]
        else:
            program += [(_AT_LEAST, 0, 2, first), (_ABOVE, 1, 0, last), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, _ERRNO | errno.ENOSYS))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def _prologue(architecture: str) -> list[Instruction]:
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[architecture]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if architecture == "x86_64":  # The x32 calls have numbers of their own.
        program += [(_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL)]
    return program


def _checked(
    number: int, argument: int, test: int, values: tuple[int, ...], refusal: int
) -> list[Instruction]:
    """Refuse the call where its argument passes a test, else allow it."""
    body: list[Instruction] = [(_LOAD, 0, 0, _argument_at(argument))]
    for value in values:
        body += [(test, 0, 1, value), (_RETURN, 0, 0, _ERRNO | refusal)]
    body.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(body), number), *body]


def _family(number: int) -> list[Instruction]:
    """Sockets of the families that are listed, and no other."""
    body: list[Instruction] = [(_LOAD, 0, 0, _argument_at(0))]
    for family in FAMILIES:
        body += [(_EQUAL, 0, 1, family), (_RETURN, 0, 0, _ALLOW)]
    body.append((_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT))
    return [(_EQUAL, 0, len(body), number), *body]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours; ``numbers`` are sorted."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] + 1 == number:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges
