"""A C++ file is compiled once a machine, on a file that compiles in no time."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hotloop.errors import RunError
from hotloop.machine import native

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(not native.has_compiler(), reason="no C++ compiler")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    return path


@needs_compiler
def test_a_library_is_built_once(source, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert native.load(source, cache=cache).answer() == 42
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.load(source, cache=cache).answer() == 42


@needs_compiler
@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_damaged_library_is_built_again(source, tmp_path, keep):
    cache = tmp_path / "cache"
    native.load(source, cache=cache)
    (built,) = cache.rglob("*.so")
    data = built.read_bytes()
    built.unlink()  # The mapped file itself must not change.
    built.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert native.load(source, cache=cache).answer() == 42
    assert built.read_bytes() == data


@needs_compiler
def test_several_builds_at_once(source, tmp_path):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as threads:
        libraries = list(threads.map(lambda _: native.load(source, cache=cache), range(4)))
    assert [library.answer() for library in libraries] == [42] * 4
    assert len(list(cache.rglob("*.so"))) == 1
    assert list(cache.rglob("*.tmp")) == []


@needs_compiler
def test_an_unusable_cache_is_gone_around(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert native.load(source, cache=tmp_path / "cache").answer() == 42


@needs_compiler
def test_the_compilers_message_is_one_line_of_the_error(source, tmp_path):
    source.write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(RunError, match="undeclared_name") as caught:
        native.load(source, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_no_compiler_and_no_headers_are_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(native.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(RunError, match="headers"):
        native.load(source, cache=tmp_path / "cache")
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with pytest.raises(RunError, match="compiler"):
        native.load(source, cache=tmp_path / "cache")


@needs_compiler
def test_a_part_without_torch_is_built_without_torch(source, tmp_path):
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from pathlib import Path\nfrom hotloop.machine import native\n"
        f"library = native.load(Path({str(source)!r}), cache=Path({str(tmp_path / 'cache')!r}),"
        " needs_torch=False)\n"
        "assert library.answer() == 42"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
