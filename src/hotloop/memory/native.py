"""Compile one C++ file against torch's headers, once a machine, and load it.

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
from pathlib import Path

import torch

from ..errors import RunError
from ..machine.cache_dir import cache_dir

_COMPILERS = ("c++", "g++", "clang++")
_STANDARDS = ("-std=c++20", "-std=c++17")
_TIME_LIMIT_S = 300.0


def load(source: Path, *, cache: Path | None = None) -> ctypes.CDLL:
    """Library built from ``source``, from the cache or freshly compiled.

    A cached file carries the hash of its contents in its name: one that is damaged is never mapped
    (a truncated library can kill the process), but built again. Processes that build at the same
    time each rename a finished file into place; the last one wins and all are equal. Where the
    cache cannot be written or used, the library is built in a folder that is removed after loading.

    Args:
        source: a C++ file that includes c10 headers only.
        cache: folder instead of ``cache_dir()/"native"``.

    Raises:
        RunError: no compiler, no headers, or the compiler or the loader refused.
    """
    compiler = _compiler()
    include = Path(torch.__file__).parent / "include"
    if not (include / "c10" / "core" / "Allocator.h").is_file():
        raise RunError("a native part needs torch's C++ headers", got=f"none in {include}")
    key = _key(source, compiler)
    try:
        folder = (cache if cache is not None else cache_dir() / "native") / key
        folder.mkdir(parents=True, exist_ok=True)
        return _load_cached(source, compiler, folder)
    except OSError:  # Not writable, full, or mounted noexec.
        return _load_once(source, compiler)


def _load_cached(source: Path, compiler: str, folder: Path) -> ctypes.CDLL:
    for path in sorted(folder.glob(f"{source.stem}-*.so")):
        if path.stem == f"{source.stem}-{_content_hash(path)}":
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    built = Path(temporary)
    try:
        _compile(source, compiler, built)
        path = folder / f"{source.stem}-{_content_hash(built)}.so"
        built.replace(path)
    finally:
        built.unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _load_once(source: Path, compiler: str) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="hotloop-native-") as folder:
            built = Path(folder) / f"{source.stem}.so"
            _compile(source, compiler, built)
            return ctypes.CDLL(str(built))
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


def _flags() -> list[str]:
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        "-O3",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        "-isystem",
        str(root / "include"),
        f"-L{root / 'lib'}",
        # torch has loaded this library already: the loader finds it by its name.
        "-lc10",
        "-pthread",
    ]


def _compile(source: Path, compiler: str, target: Path) -> None:
    message = ""
    for standard in _STANDARDS:
        # The libraries follow the source: a linker may drop those it meets before a use.
        command = [compiler, standard, str(source), *_flags(), "-o", str(target)]
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


def _key(source: Path, compiler: str) -> str:
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", timeout=30
        ).stdout
        text = source.read_text(encoding="utf-8")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RunError("a native part needs a C++ compiler that runs", got=error) from None
    parts = [text, torch.__version__, compiler, version, *_STANDARDS, *_flags()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]
