"""What tuning found, kept in the cache under the machine's and the model's fingerprints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..files import write_text_atomically
from ..machine.cache_dir import cache_dir
from ..machine.ceilings import installed_torch_version

FORMAT = 1


def remember(machine: str, model: str, knobs: Mapping[str, Any], proof: str) -> bool:
    """Keep the knobs for runs with ``plan = "auto"``; ``False``: the cache cannot be written.

    Args:
        machine, model: fingerprints.
        knobs: by dotted name, those that were searched; only such that leave results exact.
        proof: one sentence.
    """
    document = {
        "format": FORMAT,
        "machine": machine,
        "model": model,
        "torch": installed_torch_version(),
        "knobs": dict(knobs),
        "proof": proof,
        "saved_at_s": time.time(),
    }
    with contextlib.suppress(StorageError, OSError):
        write_text_atomically(_path(machine, model), json.dumps(document, indent=1) + "\n")
        return True
    return False


def recall(machine: str, model: str) -> tuple[dict[str, Any], str] | None:
    """``(knobs, proof)`` kept for this machine, model and torch; a damaged file is no file."""
    try:
        document = json.loads(_path(machine, model).read_text(encoding="utf-8"))
        known = (FORMAT, machine, model, installed_torch_version())
        if tuple(document[k] for k in ("format", "machine", "model", "torch")) != known:
            return None
        return dict(document["knobs"]), str(document["proof"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget(machine: str, model: str) -> None:
    """Drop what was kept; nothing happens where there is nothing."""
    with contextlib.suppress(OSError):
        _path(machine, model).unlink(missing_ok=True)


def journal_path(machine: str, model: str, space: str) -> Path:
    """Where the journal of an unfinished search lies.

    Raises:
        OSError: no cache folder.
    """
    return cache_dir() / "tuned" / f"{machine}-{model}-{space}.journal"


def _path(machine: str, model: str) -> Path:
    return cache_dir() / "tuned" / f"{machine}-{model}.json"
