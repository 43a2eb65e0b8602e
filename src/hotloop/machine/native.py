"""Compile one C++ file, against torch's headers where it needs them, once a machine; load it.

``torch.utils.cpp_extension`` does this too, at the price of its import, of ninja, and of headers
that take half a minute; a file that needs only c10 compiles in two seconds with the bare compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError
from .cache_dir import cache_dir


@dataclass(frozen=True)
class _Build:
    source: Path
    compiler: str
    flags: tuple[str, ...]
    mode: int


_COMPILERS = ("c++", "g++", "clang++")
_STANDARDS = ("-std=c++20", "-std=c++17")
_TIME_LIMIT_S = 300.0
_FLAGS = ("-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")


def load(
    source: Path,
    *,
    cache: Path | None = None,
    parts: Sequence[Path] = (),
    flags: Sequence[str] = (),
    mode: int = ctypes.DEFAULT_MODE,
    needs_torch: bool = True,
) -> ctypes.CDLL:
    """Library built from ``source``, from the cache or freshly compiled.

    A cached file carries the hash of its contents in its name: one that is damaged is never mapped
    (a truncated library can kill the process), but built again. Processes that build at the same
    time each rename a finished file into place; the last one wins and all are equal. Where the
    cache cannot be written or used, the library is built in a folder that is removed after loading.

    Args:
        source: a C++ file that includes c10 headers, torch's C interface, or few of ATen's, only.
        cache: folder instead of ``cache_dir()/"native"``.
        parts: files that ``source`` includes; a change in one builds anew.
        flags: for the compiler, added to the usual ones. With ``-march=native`` the caller names
            the machine in a ``-D`` flag, so that another machine builds its own.
        mode: of ``dlopen``; ``ctypes.RTLD_GLOBAL`` lets libraries loaded later use its symbols.
        needs_torch: whether it includes torch's headers; else torch is not imported.

    Raises:
        RunError: no compiler, no headers, or the compiler or the loader refused.
    """
    compiler = _compiler()
    given = (*_FLAGS, *(_torch_flags() if needs_torch else ()), *flags)
    build = _Build(source, compiler, given, mode)
    key = _key(build, parts)
    try:
        folder = (cache if cache is not None else cache_dir() / "native") / key
        folder.mkdir(parents=True, exist_ok=True)
        return _load_cached(build, folder)
    except OSError:  # Not writable, full, or mounted noexec.
        return _load_once(build)


def has_compiler() -> bool:
    """Whether there is a C++ compiler on the path."""
    return any(shutil.which(name) for name in _COMPILERS)


def _load_cached(build: _Build, folder: Path) -> ctypes.CDLL:
    source = build.source
    for path in sorted(folder.glob(f"{source.stem}-*.so")):
        if path.stem == f"{source.stem}-{_content_hash(path)}":
            return ctypes.CDLL(str(path), build.mode)
        path.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    built = Path(temporary)
    try:
        _compile(build, built)
        path = folder / f"{source.stem}-{_content_hash(built)}.so"
        built.replace(path)
    finally:
        built.unlink(missing_ok=True)
    return ctypes.CDLL(str(path), build.mode)


def _load_once(build: _Build) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="hotloop-native-") as folder:
            built = Path(folder) / f"{build.source.stem}.so"
            _compile(build, built)
            return ctypes.CDLL(str(built), build.mode)
    except OSError as error:
        raise RunError("a native part could not be built and loaded", got=error) from None


def _compiler() -> str:
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise RunError(
        "a native part needs a C++ compiler",
        got=f"none of {', '.join(_COMPILERS)}",
        next_step="install g++ or clang++",
    )


def _torch_flags() -> list[str]:
    import torch

    root = Path(torch.__file__).parent
    if not (root / "include" / "c10" / "core" / "Allocator.h").is_file():
        got = f"none in {root / 'include'}"
        raise RunError("a native part needs torch's C++ headers", got=got)
    return [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-DHOTLOOP_TORCH={torch.__version__}",
        "-isystem",
        str(root / "include"),
        f"-L{root / 'lib'}",
        # torch has loaded this library already: the loader finds it by its name.
        "-lc10",
    ]


def _compile(build: _Build, target: Path) -> None:
    source, compiler = build.source, build.compiler
    message = ""
    for standard in _STANDARDS:
        # The libraries follow the source: a linker may drop those it meets before a use.
        command = [compiler, standard, str(source), *build.flags, "-o", str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIME_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            message = f"no end after {_TIME_LIMIT_S:.0f} s"
            continue
        if done.returncode == 0:
            return
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        message = message or (lines or done.stderr.splitlines() or ["no message"])[0]
    raise RunError(f"{source.name} must compile with {compiler}", got=message)


def _key(build: _Build, parts: Sequence[Path]) -> str:
    try:
        version = subprocess.run(
            [build.compiler, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
        ).stdout
        texts = [p.read_text(encoding="utf-8") for p in (build.source, *parts)]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError("a native part needs a C++ compiler that runs", got=error) from None
    facts = [*texts, build.compiler, version, *_STANDARDS, *build.flags]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]
