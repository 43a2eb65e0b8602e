"""The names of cached files: one module has them, the docs list them."""

import ast
from pathlib import Path

import pytest

import hotloop
from hotloop.machine.cache_dir import CEILINGS, DOWNLOADS, GRAPHS, KINDS

SOURCE = Path(hotloop.__file__).parent
DOCS = SOURCE.parents[1] / "docs" / "cache.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hotloop"


def test_a_kind_names_its_files_and_finds_those_that_are_there(folder):
    assert CEILINGS.path("ab") == folder / "ceilings-ab.json"
    assert GRAPHS.path("ab") == folder / "inductor" / "ab.pt2"
    assert (CEILINGS.folder, DOWNLOADS.folder) == (folder, folder / "mnist")
    assert list(GRAPHS.found()) == []
    GRAPHS.folder.mkdir()
    for name in ("ab-1", "ab-2", "b"):
        GRAPHS.path(name).touch()
        GRAPHS.path(name).with_suffix(".json").touch()
    assert sorted(path.name for path in GRAPHS.found("ab-*")) == ["ab-1.pt2", "ab-2.pt2"]
    assert len(list(GRAPHS.found())) == 3


def test_no_two_kinds_have_one_name():
    names = [kind.path("key") for kind in KINDS]
    assert len(set(names)) == len(names)
    assert all(kind.pattern.count("*") <= 1 for kind in KINDS)


def test_the_docs_list_every_kind_and_no_other():
    if not DOCS.is_file():
        pytest.skip("an installed package has no docs")
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [kind.pattern for kind in KINDS]


def test_nothing_else_puts_a_path_together_below_the_cache():
    """``cache_dir()`` may be shown to people, but not be gone on from."""
    joined = []
    for path in SOURCE.rglob("*.py"):
        if path.name == "cache_dir.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            base = node.left if isinstance(node, ast.BinOp) else None
            base = node.value if isinstance(node, ast.Attribute) else base
            called = isinstance(base, ast.Call) and isinstance(base.func, ast.Name)
            if called and base.func.id == "cache_dir":
                joined.append(f"{path.relative_to(SOURCE)}:{base.lineno}")
    assert joined == []
