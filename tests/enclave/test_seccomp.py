"""The filter of a sandbox: its program is interpreted here, its numbers held to libseccomp's."""

import ctypes
import ctypes.util
import errno
import struct

import pytest

from hotloop.enclave.seccomp import NEW_NAMESPACES, build_filter
from hotloop.enclave.system_calls import SYSTEM_CALLS
from hotloop.errors import InputError

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def answer(program: bytes, number: int, *arguments: int, architecture: int = 0xC000003E) -> int:
    """What the kernel's machine would return: the classic BPF operations that a filter may have."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *(*arguments, *[0] * 6)[:6])
    at, accumulator = 0, 0
    code = list(struct.iter_unpack("<HBBI", program))
    while True:
        operation, yes, no, k = code[at]
        at += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
            continue
        holds = {
            0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k,
            0x45: bool(accumulator & k),
        }[operation]  # fmt: skip
        at += yes if holds else no


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_number_is_allowed_exactly_where_the_table_says(architecture):
    program, token = build_filter(architecture), ARCHITECTURES[architecture]
    column = list(ARCHITECTURES).index(architecture)
    numbers = {pair[column] for pair in SYSTEM_CALLS.values()}
    socket = SYSTEM_CALLS["socket"][column]
    for number in range(600):
        first = 1 if number == socket else 0
        wanted = ALLOW if number in numbers else ERRNO | errno.ENOSYS
        assert answer(program, number, first, architecture=token) == wanted, number


def test_another_architecture_and_x32_calls_end_the_process():
    program = build_filter("x86_64")
    assert answer(program, 0, architecture=0x40000003) == KILL
    assert answer(program, 0x40000000 | 1) == KILL


def test_arguments_are_looked_at():
    program = build_filter("x86_64")
    clone, ioctl, socket = (SYSTEM_CALLS[n][0] for n in ("clone", "ioctl", "socket"))
    assert answer(program, clone, 0x003D0F00) == ALLOW  # What a thread is made with.
    for bit in range(32):
        if NEW_NAMESPACES >> bit & 1:
            assert answer(program, clone, 1 << bit) == ERRNO | errno.EPERM
    assert answer(program, ioctl, 1, 0x5401) == ALLOW
    assert answer(program, ioctl, 1, 0x5412) == ERRNO | errno.EPERM
    assert answer(program, ioctl, 1, 0x541C) == ERRNO | errno.EPERM
    for family in range(50):
        wanted = ALLOW if family in (1, 2, 10) else ERRNO | errno.EAFNOSUPPORT
        assert answer(program, socket, family) == wanted


def test_no_number_is_another_call_s():
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("libseccomp is not installed: apt-get install libseccomp2")
    resolve = ctypes.CDLL(library).seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    for name, pair in SYSTEM_CALLS.items():
        for token, number in zip(ARCHITECTURES.values(), pair, strict=True):
            found = resolve(token, name.encode())
            assert found == number if number is not None else found < 0, name


def test_dangerous_calls_are_not_in_the_table():
    assert not SYSTEM_CALLS.keys() & {
        "ptrace", "mount", "umount2", "pivot_root", "unshare", "setns", "clone3", "bpf", "keyctl",
        "add_key", "perf_event_open", "init_module", "finit_module", "kexec_load", "reboot",
        "io_uring_setup", "process_vm_readv", "process_vm_writev", "chroot", "setuid",
        "userfaultfd",
    }  # fmt: skip


def test_an_architecture_without_numbers_is_refused():
    with pytest.raises(InputError, match="got riscv64"):
        build_filter("riscv64")
