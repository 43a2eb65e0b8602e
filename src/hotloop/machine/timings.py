"""What was timed on this machine before: the fastest kernel of each piece of work, in one file.

Written by whoever timed something (a compiled step, `hotloop run`), read by all, so that the second
run of a program neither measures again nor takes another choice than the first.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..files import write_text_atomically
from .cache_dir import cache_dir
from .machine import Machine


def read(torch_version: str, fingerprint: str | None = None) -> dict[str, Any]:
    """Key -> ``[kernel, {kernel: seconds}]``; empty where there is no file or a damaged one.

    Args:
        torch_version: of the torch whose kernels they are.
        fingerprint: of the machine, where the caller has it; else this one is probed.
    """
    try:
        table = json.loads(_path(torch_version, fingerprint).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def add(torch_version: str, entries: dict[str, Any], fingerprint: str | None = None) -> None:
    """Add entries; what other processes wrote meanwhile is kept.

    A file that cannot be written is left: the same is timed again next time.
    """
    if not entries:
        return
    table = read(torch_version, fingerprint) | entries
    with contextlib.suppress(StorageError, OSError):
        write_text_atomically(_path(torch_version, fingerprint), json.dumps(table, indent=1))


def _path(torch_version: str, fingerprint: str | None) -> Path:
    fingerprint = fingerprint or Machine.probe().fingerprint()
    return cache_dir() / f"routes-{fingerprint}-{torch_version}.json"
