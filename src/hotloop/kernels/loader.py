"""Chooses, loads and checks the library of kernels."""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..machine.probe.isa import read_cpuinfo
from ..machine.probe.system import read_architecture
from ..machine.probe.tree import Tree
from . import binding
from .levels import LEVELS, Choice, Level, choose

# Names a level (``x86-64-v3``) to load instead of the best one; ``off``: none.
LEVEL_VARIABLE = "HOTLOOP_KERNELS"
_HERE = Path(__file__).parent
# A wheel has the libraries beside this file. An editable install leaves the sources where they are
# and puts what it built into the environment.
_FOLDERS = (
    _HERE / "lib",
    Path(sysconfig.get_path("platlib")) / "hotloop" / "kernels" / "lib",
)


@functools.cache
def chosen() -> Choice:
    """The level for this machine, or the one that ``HOTLOOP_KERNELS`` names.

    Raises:
        RunError: ``HOTLOOP_KERNELS`` names no level.
    """
    named = os.environ.get(LEVEL_VARIABLE)
    if named:
        for level in LEVELS:
            if level.name == named:
                return Choice(level, f"{LEVEL_VARIABLE} names it")
        if named == "off":
            return Choice(None, f"{LEVEL_VARIABLE} is off")
        names = ", ".join([*(level.name for level in LEVELS), "off"])
        raise RunError(f"{LEVEL_VARIABLE} must be one of {names}", got=named)
    return choice_below("/")


def choice_below(root: str | Path) -> Choice:
    """The level for the machine whose files lie below ``root``; see ``Machine.probe``."""
    tree = Tree(root)
    cpuinfo = read_cpuinfo(tree)
    return choose(read_architecture(tree, cpuinfo), cpuinfo.flags or frozenset())


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, with types for each function of the binding.

    Raises:
        RunError: there is none for this processor, or it was built from another binding.
    """
    choice = chosen()
    if choice.level is None:
        raise RunError("hotloop's kernels must be there for this processor", got=choice.reason)
    return load(choice.level)


def load(level: Level) -> ctypes.CDLL:
    """The library of one level, beside the one that is in use.

    Raises:
        RunError: it is not there, or was built from another binding.
    """
    path = _path(level.name)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise RunError("hotloop's kernels must load", got=error) from None
    _check(loaded, path)
    return loaded


@functools.cache
def unavailable_reason() -> str | None:
    """Why there are no kernels here, in one line; ``None``: there are."""
    try:
        library()
    except RunError as error:
        return str(error)
    return None


def is_available() -> bool:
    """Whether the kernels can be used here."""
    return unavailable_reason() is None


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library that returns a status.

    Raises:
        RunError: it failed; with the library's own words.
    """
    loaded = library()
    if getattr(loaded, name)(*arguments):
        raise failure(loaded)


@functools.cache
def build_hash() -> str:
    """16 hex digits of the C++ that the library was built from: other kernels, other measurements.

    Raises:
        RunError: there are no kernels here.
    """
    built: bytes = library().hotloop_build_hash()
    return built.decode()


def failure(loaded: ctypes.CDLL) -> RunError:
    """The error of this thread's last call that returned a status other than 0."""
    said: bytes = loaded.hotloop_error()
    return RunError(said.decode(errors="replace"))


def _path(name: str) -> Path:
    for folder in _FOLDERS:
        path = folder / f"libhotloop-{name}.so"
        if path.is_file():
            return path
    raise RunError(
        "hotloop's kernels must be installed",
        got=f"no libhotloop-{name}.so",
        next_step="install g++ and install hotloop again, or install its wheel",
    )


def _check(loaded: ctypes.CDLL, path: Path) -> None:
    """Both sides must agree on every structure.

    Raises:
        RunError: they do not.
    """
    next_step = "install hotloop again"
    try:
        binding.declare(loaded)
    except AttributeError as error:
        raise RunError(
            f"{path.name} must fit this hotloop", got=error, next_step=next_step
        ) from None
    built: bytes = loaded.hotloop_binding_hash()
    if built.decode() != binding.binding_hash():
        raise RunError(
            f"{path.name} must be built from the binding of this hotloop",
            got=f"{built.decode()} for {binding.binding_hash()}",
            next_step=next_step,
        )
    rows = binding.layout()
    table = (ctypes.c_int64 * len(rows))(*rows)
    wrong = loaded.hotloop_check_layout(ctypes.addressof(table), len(rows))
    if wrong >= 0:
        got = binding.layout_names()[wrong]
        raise RunError(f"{path.name} must lay structures out as Python does", got=got)


@functools.cache
def use_torch() -> None:
    """Let the library call torch, and share its OpenMP threads. Imports torch; once a process.

    Raises:
        RunError: there are no kernels here.
    """
    import torch

    folder = Path(torch.__file__).parent / "lib"
    loaded = library()
    by_name = _entries(folder / "libtorch_cpu.so")
    names = [name for name, *_ in binding.TorchInterface._fields_]
    interface = binding.TorchInterface(*(by_name(name) for name in names))
    loaded.hotloop_use_torch(ctypes.addressof(interface))
    # torch has loaded this one, so the loader gives the same one for its name.
    openmp = _entries("libgomp.so.1")
    entries = [openmp(name) for name in _OPENMP_NAMES]
    if all(entries):
        runtime = binding.OpenMp(*entries)
        loaded.hotloop_use_openmp(ctypes.addressof(runtime))


# In the order of binding.OpenMp.
_OPENMP_NAMES = (
    "GOMP_parallel",
    "GOMP_barrier",
    "omp_get_thread_num",
    "omp_get_num_threads",
    "omp_get_max_threads",
    "omp_set_num_threads",
)


def _entries(path: Path | str) -> Callable[[str], int | None]:
    """Where a loaded library has its functions, by name; ``None``: it has none of that name."""
    try:
        loaded = ctypes.CDLL(str(path), os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return lambda name: None

    def address(name: str) -> int | None:
        try:
            return ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
        except AttributeError:
            return None

    return address
