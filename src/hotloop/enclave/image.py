"""The files that an enclave's image has: interpreter, standard library, packages, hotloop."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .sandbox import SOURCE

# Of packages: what no program opens when it runs.
_LEFT_OUT = {"__pycache__", "include", "tests", "test", "share", "idlelib", "ensurepip", "tkinter"}
_ENDINGS_LEFT_OUT = (".pyi", ".h", ".hpp", ".a", ".c", ".cpp", ".cmake", ".pxd", ".pyx")
_ROOTS = ("numpy",)
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def image_files(needs_torch: bool) -> list[Path]:
    """Regular files of the image, sorted; symbolic links are left to the image's builder."""
    files = set(_tree(Path(sysconfig.get_paths()["stdlib"]), skip={"site-packages"}))
    files |= set(_tree(Path(SOURCE) / "hotloop"))
    for name in _closure([*_ROOTS, "torch"] if needs_torch else [*_ROOTS]):
        files |= set(_of_distribution(name))
    files.add(Path(os.path.realpath(sys.executable)))
    files |= set(_system_libraries())
    return sorted(path for path in files if path.is_file() and not path.is_symlink())


def environment() -> dict[str, str]:
    """Variables of a program in the image: where hotloop and its packages are among them."""
    folders = (SOURCE, sysconfig.get_paths()["purelib"])
    return {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders)),
    }


@functools.cache
def image_bytes(needs_torch: bool) -> int:
    """Bytes of the files of ``image_files``, whole pages each."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in image_files(needs_torch))


def sha256_of(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree(root: Path, skip: set[str] | None = None) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _LEFT_OUT | (skip or set())]
        for name in files:
            if not name.endswith(_ENDINGS_LEFT_OUT):
                yield Path(folder, name)


def _closure(names: list[str]) -> set[str]:
    """Distributions and what they require without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for line in required:
            match = _NAME.match(line)
            if match is not None and "extra ==" not in line:
                waiting.append(match[0])
    return found


def _of_distribution(name: str) -> Iterator[Path]:
    for entry in metadata.files(name) or []:
        if not _LEFT_OUT & set(entry.parts) and not entry.name.endswith(_ENDINGS_LEFT_OUT):
            yield Path(os.path.abspath(str(entry.locate())))


def _system_libraries() -> Iterator[Path]:
    """Libraries of the system that this process has mapped: the loader and the C library."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        path = line.partition("/")[2]
        found = os.path.realpath(f"/{path}")
        if ".so" in path and found.startswith(("/usr/lib", "/lib")):
            yield Path(found)
