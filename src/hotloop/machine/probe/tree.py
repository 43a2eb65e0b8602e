"""Reading small kernel files below a root; what cannot be read or parsed is ``None``."""

from __future__ import annotations

import os
import re
from pathlib import Path

MAX_FILE_BYTES = 16 * 1024**2
# The kernel's own ceiling on CPU numbers is far below; a range past it is garbage, and
# expanding it would take all memory.
MAX_CPUS = 65_536

_INT = re.compile(r"-?\d{1,20}")
_SIZE = re.compile(r"(\d{1,12})([KMG]?)")
_FACTORS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def parse_int(text: str | None) -> int | None:
    """The integer that ``text`` is, else ``None``."""
    if text is None or not _INT.fullmatch(text.strip()):
        return None
    return int(text.strip())  # int() strips less than strip() does.


def parse_cpu_list(text: str | None) -> tuple[int, ...] | None:
    """Sorted CPU numbers of the kernel's list format, such as ``"0-3,8,10-11"``.

    An empty list is ``()``; text in any other format is ``None``.
    """
    if text is None:
        return None
    cpu_ids: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        start, end = parse_int(first), parse_int(last) if dash else parse_int(first)
        if start is None or end is None or not 0 <= start <= end < MAX_CPUS:
            return None
        cpu_ids.update(range(start, end + 1))
    return tuple(sorted(cpu_ids))


def parse_size(text: str | None) -> int | None:
    """Bytes of a sysfs cache size, such as ``"48K"`` or ``"32M"``."""
    match = _SIZE.fullmatch(text.strip()) if text is not None else None
    return int(match[1]) * _FACTORS[match[2]] if match else None


def parse_fields(text: str | None) -> dict[str, str]:
    """``name: value`` lines as a dict, stripped; lines without a colon are left out."""
    pairs = (line.partition(":") for line in (text or "").splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


class Tree:
    """Files of one machine, captured or live.

    Args:
        root: the folder that stands for ``/``. Paths given to the methods are absolute
            (``"/proc/cpuinfo"``) and are looked up below it.
    """

    def __init__(self, root: str | Path = "/") -> None:
        self.root = str(root)
        self._prefix = self.root.rstrip("/")

    @property
    def is_live(self) -> bool:
        """Whether this is the running machine and not a captured tree."""
        return os.path.abspath(self.root) == "/"

    def text(self, path: str) -> str | None:
        """Content of a file without surrounding blanks, ``None`` when it cannot be read."""
        try:
            with open(self._prefix + path, "rb", buffering=0) as file:
                chunks = []
                left = MAX_FILE_BYTES
                while left > 0 and (chunk := file.read(min(left, 1 << 16))):
                    chunks.append(chunk)
                    left -= len(chunk)
        except (OSError, ValueError):
            return None
        return b"".join(chunks).decode("utf-8", "replace").strip()

    def number(self, path: str) -> int | None:
        """The integer in a file."""
        return parse_int(self.text(path))

    def cpu_list(self, path: str) -> tuple[int, ...] | None:
        """The CPU numbers in a file in the kernel's list format."""
        return parse_cpu_list(self.text(path))

    def exists(self, path: str) -> bool:
        """Whether there is something at the path."""
        try:
            return os.path.lexists(self._prefix + path)
        except ValueError:
            return False

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""
        try:
            return os.path.isdir(self._prefix + path)
        except ValueError:
            return False

    def names(self, path: str) -> list[str]:
        """Sorted names in a folder; empty when there is none."""
        try:
            return sorted(os.listdir(self._prefix + path))
        except (OSError, ValueError):
            return []

    def numbered(self, folder: str, stem: str) -> list[int]:
        """Sorted N of the entries ``stemN`` in a folder: ``cpu0``, ``cpu1``, ..."""
        pattern = re.compile(re.escape(stem) + r"(\d{1,6})")
        found = (pattern.fullmatch(name) for name in self.names(folder))
        return sorted(int(match[1]) for match in found if match)
