"""Ceilings kept between runs, for this machine and this torch."""

from __future__ import annotations

import contextlib
import json
import time

from ..errors import StorageError
from ..files import write_text_atomically
from .cache_dir import CEILINGS
from .ceilings import Ceilings, installed_torch_version


def load(fingerprint: str, *, max_age_s: float | None) -> Ceilings | None:
    """The figures kept if they hold for this machine and torch; a damaged file is no file."""
    try:
        ceilings = Ceilings.from_dict(
            json.loads(CEILINGS.path(fingerprint).read_text(encoding="utf-8"))
        )
        age_s = time.time() - ceilings.measured_at_s
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    known = (fingerprint, installed_torch_version())
    if (ceilings.fingerprint, ceilings.torch_version) != known:
        return None
    return ceilings if max_age_s is None or 0 <= age_s <= max_age_s else None


def store(fingerprint: str, ceilings: Ceilings) -> None:
    """Keep the figures where that is possible: those that cannot be kept are still good."""
    with contextlib.suppress(StorageError, OSError):
        text = json.dumps(ceilings.to_dict(), indent=1, sort_keys=True)
        write_text_atomically(CEILINGS.path(fingerprint), text)


def clear() -> int:
    """Drop the figures kept, of all machines; how many machines that were."""
    count = 0
    with contextlib.suppress(OSError):
        for path in CEILINGS.found():
            path.unlink()
            count += 1
    return count
