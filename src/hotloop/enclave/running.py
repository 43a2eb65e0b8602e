"""Run a command in a sandbox under a hard memory limit, and say what it took."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import RunError
from .limits import MemoryLimit, memory_limit
from .sandbox import Sandbox
from .seccomp import build_filter

_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, kw_only=True)
class SandboxRun:
    """What a command did in its sandbox.

    Attributes:
        exit_code: of the command; 128 and the signal's number where it was killed.
        out_of_memory: whether the kernel killed it at the limit; ``None`` where that is not told.
        limit_kind, limit_bytes, limit_reason: of the limit, see ``MemoryLimit``.
        wall_s: seconds from start to end.
        taken_bytes: memory at its highest. Of bubblewrap: resident memory of each process, file
            pages included, and ``kernel_bytes``. Of gVisor, whose processes map the same pages:
            ``charged_bytes``. ``None`` without a control group.
        kernel_bytes: highest use of the kernel for the group: page tables, stacks.
        charged_bytes: highest use that counted against the limit, file cache included.
        threads: most threads of the largest process.
    """

    exit_code: int
    out_of_memory: bool | None
    limit_kind: str
    limit_bytes: int
    limit_reason: str | None
    wall_s: float
    taken_bytes: int | None
    kernel_bytes: int | None
    charged_bytes: int | None
    threads: int | None


def run_in_sandbox(sandbox: Sandbox, words: list[str], limit_bytes: int) -> SandboxRun:
    """Run ``words`` in the sandbox with no more memory than ``limit_bytes``.

    Standard input, output and error are the caller's; SIGTERM and SIGINT reach the command.

    Raises:
        InputError: the sandbox's program is not installed.
        RunError: the sandbox itself did not start.
    """
    start = time.monotonic()
    with memory_limit(limit_bytes) as limit, _prepared(sandbox, words) as (command, fds):
        try:
            process = subprocess.Popen(limit.command(command), pass_fds=fds)
        except OSError as error:
            raise RunError("the sandbox must start", got=error.strerror) from None
        with _Watch(limit) as watch, _forwarded(process):
            code = process.wait()
        charged, taken = limit.peak_bytes(), watch.resident_bytes + watch.kernel_bytes
        return SandboxRun(
            exit_code=code if code >= 0 else 128 - code,
            out_of_memory=limit.was_hit(),
            limit_kind=limit.kind,
            limit_bytes=limit.limit_bytes,
            limit_reason=limit.reason,
            wall_s=time.monotonic() - start,
            taken_bytes=charged if sandbox.kind == "gvisor" else taken or None,
            kernel_bytes=watch.kernel_bytes or None,
            charged_bytes=charged,
            threads=watch.threads or None,
        )


@contextlib.contextmanager
def _prepared(sandbox: Sandbox, words: list[str]) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """The command with what it needs: a file with the filter, or a bundle."""
    if sandbox.kind == "gvisor":
        folder = Path(tempfile.mkdtemp(prefix="hotloop-gvisor-"))
        try:
            (folder / "rootfs").mkdir()
            (folder / "config.json").write_text(json.dumps(sandbox.bundle(words)))
            yield sandbox.runsc_command(folder), ()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    if not sandbox.seccomp:
        yield sandbox.command(words), ()
        return
    with tempfile.TemporaryFile() as file:
        _write_filter(file)
        yield sandbox.command(words, file.fileno()), (file.fileno(),)


def _write_filter(file: BinaryIO | tempfile._TemporaryFileWrapper[bytes]) -> None:
    file.write(build_filter())
    file.flush()
    file.seek(0)


@contextlib.contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on; a terminal sends SIGINT to all of them itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda received, _frame: process.send_signal(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """Reads what the processes of a control group hold, until it is closed."""

    def __init__(self, limit: MemoryLimit) -> None:
        self.kernel_bytes = self.threads = 0
        self._highest: dict[int, int] = {}
        self._limit = limit
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self.kernel_bytes = max(self.kernel_bytes, self._limit.kernel_bytes() or 0)
            for process in self._limit.process_ids():
                self._look_at(process)

    def _look_at(self, process: int) -> None:
        try:
            text = Path(f"/proc/{process}/status").read_text()
        except OSError:  # It has ended.
            return
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        self.threads = max(self.threads, int(fields.get("Threads", "0")))
        highest = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
        self._highest[process] = max(highest, self._highest.get(process, 0))

    @property
    def resident_bytes(self) -> int:
        """Sum of the highest resident memory of each process."""
        return sum(self._highest.values())
