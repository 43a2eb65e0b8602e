"""How large an enclave must be: what runs inside, what each kind adds, and its steps of size.

Each constant carries its source, or says that it is measured here or assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import BudgetError, InputError
from ..units import GIB, KIB, MIB, format_bytes
from .needs import Needs

KINDS = ("sandbox", "gvisor", "gramine-sgx", "nitro", "sev-snp", "tdx")

# Linux, arch/x86/include/asm/page_64_types.h: THREAD_SIZE_ORDER 2.
_KERNEL_STACK_BYTES = 16 * KIB
# The kernel's memory of a process, most of it page tables (8 bytes for each page of 4 KiB: Intel
# SDM volume 3, 4.5). Measured here: 0.7 MiB for an export, 2.3 MiB for a training of 400 MiB.
_PAGE_TABLE_SHARE, _PAGE_TABLE_LEAST_BYTES = 0.0045, 512 * KIB
# Measured here: bubblewrap 0.8 (two processes and the shell that becomes it).
_BUBBLEWRAP_BYTES = 3400 * KIB
# Fitted here to two programs (training with PyTorch, an export without it) under runsc 20221219:
# its kernel, gofer and stubs, and the share of the libraries' pages that it holds itself: those
# that are written (relocations) and files that are read. The rest is the host's file cache.
_RUNSC_BYTES, _RUNSC_FILE_SHARE = 11 * MIB, 0.735

# Gramine 1.9, pal/src/host/linux-sgx/pal_linux_defs.h: SSA_FRAME_NUM x SSA_FRAME_SIZE,
# ENCLAVE_STACK_SIZE, ENCLAVE_SIG_STACK_SIZE; one page each of TCS and TLS (sgx_sign.py); and
# libos/include/libos_defs.h: LIBOS_THREAD_LIBOS_STACK_SIZE.
_GRAMINE_THREAD_BYTES = (2 * 16 + 256 + 64 + 4 + 4 + 32) * KIB
# Documentation/manifest-syntax.rst, sgx.max_threads: IPC, async and TLS-handshake threads.
GRAMINE_THREADS = 3
# The value of Gramine's Python example (CI-Examples/python); its default is 256 KiB, too little
# for NumPy. Threads of the C library take the same (RLIMIT_STACK).
GRAMINE_STACK_BYTES = 2 * MIB
# Assumed, not measured: text and data of Gramine's loader, library OS and C library, and their
# tables of mappings and files.
_GRAMINE_BYTES = 32 * MIB
# glibc, malloc/arena.c: HEAP_MAX_SIZE, 2 x DEFAULT_MMAP_THRESHOLD_MAX on 64 bits. An arena
# reserves twice that to align it, then gives half back.
_ARENA_BYTES = 64 * MIB

# Linux, Documentation/virt/ne_overview.rst: multiples of 2 MiB, at least 64 MiB.
_NITRO_STEP_BYTES, _NITRO_LEAST_BYTES = 2 * MIB, 64 * MIB
# nitro-cli, error E26: at least four times the size of the image file.
_NITRO_IMAGE_FACTOR = 4
# Linux, include/linux/mm_types.h: struct page, 64 bytes for each page of 4 KiB.
_MEMMAP_SHARE = 64 / 4096
# Linux, arch/x86/mm/mem_encrypt.c: bounce buffers of an encrypted guest, 6 % of its memory, from
# 64 MiB (IO_TLB_DEFAULT_SIZE) to 1 GiB.
_BOUNCE_SHARE, _BOUNCE_LEAST_BYTES, _BOUNCE_MOST_BYTES = 0.06, 64 * MIB, 1 * GIB
# Assumed, not measured: text, data and slabs of a kernel for virtual machines, and its init.
_GUEST_KERNEL_BYTES = 64 * MIB
# Assumed, not measured: OVMF's image and tables.
_FIRMWARE_BYTES = 16 * MIB

THREAD_RESERVE = 4
# The budget's own error, see docs/memory.md.
RESERVE_SHARE = 0.03


@dataclass(frozen=True, kw_only=True)
class EnclaveSize:
    """The size of an enclave for a program.

    Attributes:
        kind: one of ``KINDS``.
        needs: what runs inside.
        overhead: title and bytes of each row that the kind adds.
        needed_bytes: the program and the overhead.
        size_bytes: what to ask for: ``needed_bytes`` and ``RESERVE_SHARE`` of it, in the kind's
            steps.
        threads: slots to ask for, with ``THREAD_RESERVE``.
        notes: what was assumed, one line each.
    """

    kind: str
    needs: Needs
    overhead: tuple[tuple[str, int], ...]
    needed_bytes: int
    size_bytes: int
    threads: int
    notes: tuple[str, ...]

    def table(self) -> list[tuple[str, int | None]]:
        """Rows in the guide's words and order, the enclave's, and the totals."""
        return [
            *self.needs.components,
            *self.overhead,
            ("Total", self.needed_bytes),
            ("Enclave size", self.size_bytes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "kind": self.kind,
            "phase": self.needs.phase,
            "batch_size": self.needs.batch_size,
            "micro_batch_size": self.needs.micro_batch_size,
            "components": dict(self.needs.components),
            "overhead": dict(self.overhead),
            "program_bytes": self.needs.total_bytes,
            "needed_bytes": self.needed_bytes,
            "size_bytes": self.size_bytes,
            "threads": self.threads,
            "notes": list(self.notes),
        }

    def require_fit(self, limit_bytes: int, largest: int | None) -> None:
        """Refuse a size that is too small.

        Raises:
            BudgetError: the enclave must be larger than ``limit_bytes``.
        """
        if self.size_bytes <= limit_bytes:
            return
        advice = (
            f"--micro-batch-size {largest}" if largest is not None and self.needs.phase == "train"
            else f"--batch-size {largest}" if largest is not None
            else f"allow {format_bytes(self.size_bytes)}, or use a smaller model"
        )  # fmt: skip
        raise BudgetError(
            f"the {self.kind} enclave must fit {format_bytes(limit_bytes)}",
            got=f"{format_bytes(self.size_bytes)} at batch {self.needs.micro_batch_size}",
            next_step=advice,
        )


def size_enclave(
    needs: Needs,
    kind: str,
    *,
    tmp_bytes: int = 0,
    image_bytes: int = 0,
    malloc_arenas: int = 1,
    edmm: bool = False,
) -> EnclaveSize:
    """The size of an enclave of this kind for a program.

    Args:
        needs: what runs inside.
        kind: one of ``KINDS``.
        tmp_bytes: files that the program keeps in memory (tmpfs, protected files).
        image_bytes: files of a virtual machine's image, which lies in its memory.
        malloc_arenas: ``MALLOC_ARENA_MAX`` of the C library inside.
        edmm: whether pages of SGX are added when they are needed.

    Raises:
        InputError: the kind is not known.
    """
    if kind not in KINDS:
        raise InputError(
            "an enclave's kind must be known", got=repr(kind), next_step=f"use {', '.join(KINDS)}"
        )
    threads = needs.threads + THREAD_RESERVE
    if kind == "gramine-sgx":
        threads += GRAMINE_THREADS
        return _gramine(needs, threads, tmp_bytes, malloc_arenas, edmm)
    if kind in ("nitro", "sev-snp", "tdx"):
        return _guest(needs, kind, threads, tmp_bytes, image_bytes)
    rows = [("Page tables", _page_tables(needs.total_bytes))]
    rows.append(("Stacks of threads", threads * _KERNEL_STACK_BYTES))
    if kind == "gvisor":
        rows.insert(0, ("Library kernel", _RUNSC_BYTES))
        rows.append(("Files that it holds", int(needs.mapped_resident_bytes * _RUNSC_FILE_SHARE)))
        # It maps libraries from the host's files, whose cache is not the sandbox's.
        rows.append(("Libraries of the host", -needs.mapped_resident_bytes))
    else:
        rows.insert(0, ("Loader", _BUBBLEWRAP_BYTES))
    rows.append(("Files in memory", tmp_bytes))
    return _sized(needs, kind, threads, rows, lambda needed: _up(needed, 4 * KIB))


def _gramine(
    needs: Needs, threads: int, tmp_bytes: int, malloc_arenas: int, edmm: bool
) -> EnclaveSize:
    rows = [
        ("Loader and library OS", _GRAMINE_BYTES),
        ("Stacks of threads", threads * (_GRAMINE_THREAD_BYTES + GRAMINE_STACK_BYTES)),
        ("Arenas of the C library", (malloc_arenas - 1) * _ARENA_BYTES),
        ("Libraries, whole", _unread(needs)),
        ("Files in memory", tmp_bytes),
    ]
    notes = [f"assumed: {format_bytes(_GRAMINE_BYTES)} for the loader and library OS"]
    if edmm:
        notes.append("with EDMM the size is a limit: memory is taken when it is needed")
    # host_main.c: "Enclave size not a power of two (an SGX-imposed requirement)", EDMM or not.
    return _sized(needs, "gramine-sgx", threads, rows, _power_of_two, notes)


def _guest(needs: Needs, kind: str, threads: int, tmp_bytes: int, image_bytes: int) -> EnclaveSize:
    """A virtual machine whose files lie in its memory."""
    # What is mapped from the image is the image's own pages.
    files = max(0, image_bytes - needs.mapped_resident_bytes)
    rows = [
        ("Kernel and init", _GUEST_KERNEL_BYTES),
        ("Page tables", _page_tables(needs.total_bytes)),
        ("Stacks of threads", threads * _KERNEL_STACK_BYTES),
        ("Files of the image", files),
        ("Files in memory", tmp_bytes),
    ]
    notes = [f"assumed: {format_bytes(_GUEST_KERNEL_BYTES)} for kernel and init"]
    if kind == "nitro":
        # Packed, the image lies beside its files until they are unpacked, before the program.
        least = max(_NITRO_LEAST_BYTES, _NITRO_IMAGE_FACTOR * image_bytes)

        def steps(needed: int) -> int:
            return _up(max(needed, least), _NITRO_STEP_BYTES)

        return _sized(needs, kind, threads, _with_memmap(needs, rows, 0.0), steps, notes)
    rows.insert(0, ("Firmware", _FIRMWARE_BYTES))
    notes.append(f"assumed: {format_bytes(_FIRMWARE_BYTES)} for the firmware")
    rows = _with_memmap(needs, rows, _BOUNCE_SHARE)
    return _sized(needs, kind, threads, rows, lambda needed: _up(needed, MIB), notes)


def _with_memmap(
    needs: Needs, rows: list[tuple[str, int]], bounce_share: float
) -> list[tuple[str, int]]:
    """The rows, with what grows with the size itself: one record a page, and bounce buffers."""
    fixed = needs.total_bytes + sum(size for _, size in rows)
    size = float(fixed)
    for _ in range(50):  # A contraction: each turn adds less than a tenth of the last.
        size = fixed + size * _MEMMAP_SHARE + _bounce(size, bounce_share)
    rows = [*rows, ("Page records", int(size * _MEMMAP_SHARE) + 1)]
    return [*rows, ("Bounce buffers", _bounce(size, bounce_share))] if bounce_share else rows


def _bounce(size: float, share: float) -> int:
    if not share:
        return 0
    return int(min(max(size * share, _BOUNCE_LEAST_BYTES), _BOUNCE_MOST_BYTES))


def _sized(
    needs: Needs,
    kind: str,
    threads: int,
    rows: list[tuple[str, int]],
    steps: Callable[[int], int],
    notes: list[str] | None = None,
) -> EnclaveSize:
    needed = needs.total_bytes + sum(size for _, size in rows)
    return EnclaveSize(
        kind=kind,
        needs=needs,
        overhead=tuple(row for row in rows if row[1]),
        needed_bytes=needed,
        size_bytes=steps(needed + int(needed * RESERVE_SHARE)),
        threads=threads,
        notes=(*needs.assumptions, *(notes or ())),
    )


def _page_tables(resident_bytes: int) -> int:
    return _PAGE_TABLE_LEAST_BYTES + int(resident_bytes * _PAGE_TABLE_SHARE)


def _unread(needs: Needs) -> int:
    """Libraries are read whole where no kernel pages them in as they are touched."""
    return max(0, needs.mapped_files_bytes - needs.mapped_resident_bytes)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
