"""Which library is loaded, and what is said where none can be."""

import ctypes
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.errors import RunError
from hotloop.kernels import LEVELS, binding, choose, loader
from hotloop.machine import Machine

needs_kernels = pytest.mark.skipif(
    not loader.is_available(), reason=loader.unavailable_reason() or ""
)
EVERY_FEATURE = sorted(set().union(*(level.needs for level in LEVELS)))


@given(st.sets(st.sampled_from(EVERY_FEATURE)), st.sampled_from(["x86_64", "aarch64"]))
def test_the_best_level_that_the_processor_allows(features, architecture):
    choice = choose(architecture, features)
    possible = [
        level for level in LEVELS if level.architecture == architecture and level.needs <= features
    ]
    assert choice.level == (possible[0] if possible else None)
    if choice.level != next(level for level in LEVELS if level.architecture == architecture):
        assert " needs " in choice.reason
        named = choice.reason.removesuffix(" ...").partition(" needs ")[2].split(", ")
        assert named
        assert set(named) <= set(EVERY_FEATURE) - features


def test_another_processor_has_none():
    assert choose("riscv64", {"asimd"}).reason == "hotloop has no kernels for riscv64"


@pytest.mark.skipif(shutil.which("c++") is None, reason="installed without a C++ compiler")
def test_where_there_is_a_compiler_the_kernels_are_there():
    assert loader.unavailable_reason() is None


def loaded_in_a_process(level):
    code = "from hotloop.kernels import library; print(library()._name)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"HOTLOOP_KERNELS": level, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )


@needs_kernels
def test_a_level_can_be_named():
    lowest = [v for v in LEVELS if v.architecture == Machine.probe().architecture][-1]
    assert loaded_in_a_process(lowest.name).stdout.strip().endswith(f"-{lowest.name}.so")


def test_no_level_can_be_named():
    done = loaded_in_a_process("off")
    assert done.stderr.splitlines()[-1].endswith("got HOTLOOP_KERNELS is off.")


def test_a_level_that_does_not_exist_is_one_line():
    done = loaded_in_a_process("x86-64-v9")
    assert done.stderr.splitlines()[-1].startswith("hotloop.errors.RunError: HOTLOOP_KERNELS must")


def test_a_library_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "_FOLDERS", (tmp_path,))
    with pytest.raises(RunError, match=r"must be installed.*install g"):
        loader.library.__wrapped__()


def test_a_file_that_is_no_library_is_one_line(monkeypatch, tmp_path):
    (tmp_path / f"libhotloop-{kernels.chosen().level.name}.so").write_bytes(b"not a library")
    monkeypatch.setattr(loader, "_FOLDERS", (tmp_path,))
    with pytest.raises(RunError, match="must load"):
        loader.library.__wrapped__()


@needs_kernels
def test_a_library_of_another_binding_is_refused(monkeypatch):
    monkeypatch.setattr(binding, "binding_hash", lambda: "0" * 16)
    with pytest.raises(RunError, match="built from the binding"):
        loader.library.__wrapped__()


@needs_kernels
def test_a_structure_laid_out_otherwise_is_named(monkeypatch):
    class Other(ctypes.Structure):
        _fields_ = [(name, kind) for name, kind, *_ in binding.RowCopy._fields_]
        _fields_.insert(3, ("another", ctypes.c_int32))

    Other.__doc__ = binding.RowCopy.__doc__
    binding.binding_hash()  # Kept: only the layout differs.
    monkeypatch.setitem(binding._structures, "RowCopy", Other)
    with pytest.raises(RunError, match="got size of RowCopy"):
        loader.library.__wrapped__()


@needs_kernels
def test_both_sides_agree_on_every_structure():
    rows = binding.layout()
    assert len(rows) == len(binding.layout_names())
    table = (ctypes.c_int64 * len(rows))(*rows)
    assert kernels.library().hotloop_check_layout(ctypes.addressof(table), len(rows)) == -1
    for index in range(len(rows)):
        changed = (ctypes.c_int64 * len(rows))(*rows)
        changed[index] += 1
        found = kernels.library().hotloop_check_layout(ctypes.addressof(changed), len(rows))
        assert found == index


def test_more_than_eight_parameters_are_refused():
    with pytest.raises(ValueError, match="put them in a structure"):
        binding.function("too_many", **{f"p{n}": binding.int64 for n in range(9)})
    assert "too_many" not in binding._functions
