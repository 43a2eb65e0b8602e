"""A process of our own that answers each line with a line."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any

from ..errors import RunError

# What a child may need to notice the end of its input.
_LEAVE_S = 2.0


class Child:
    """``python -m MODULE ARGS`` with pipes; JSON lines both ways, one answer a line.

    Args:
        name: what it is called in errors.
        module: run as a program. arguments: of it.
        environment: variables besides those of this process.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # The modules that are found here are found there.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                **(environment or {}),
            },
            # Ctrl-C is for the parent, which ends its children; and they are ended with theirs.
            start_new_session=True,
        )

    def tell(self, **values: Any) -> None:
        """Send a line; a child that is gone is found out by ``answer``."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The answer to the last line.

        Raises:
            RunError: none within ``limit_s``, the child ended, or it says that it failed.
        """
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise RunError(f"{self.name} must answer within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self.name} must run", got=self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise RunError(f"{self.name} must run", got=answer["failed"])
        return answer

    def close(self) -> None:
        """End it and what it started. Twice is allowed."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # What was not yet written.
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVE_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}, {lines[-1][:300]}"
