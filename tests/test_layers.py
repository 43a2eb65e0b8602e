"""The rooms import one way, and inside a room the modules do: no arrow right, no circle."""

import ast
from pathlib import Path

import pytest

import hotloop

SOURCE = Path(hotloop.__file__).parent
ORDER = [
    "lazy", "version", "errors", "units", "files", "listening", "sealed", "machine", "kernels",
    "measure", "plan", "monitor",
    "memory", "data", "graph", "step", "parallel", "tuning", "train", "infer", "enclave", "serve",
    "report", "bench", "launch", "integrations", "cli",
]  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path, text: str) -> set[tuple[str, ...]]:
    """Dotted names of ``hotloop`` that the file imports anywhere: inside functions too, and for
    types alone."""
    package = ["hotloop", *path.relative_to(SOURCE).parent.parts]
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            found |= {(*base, alias.name) for alias in node.names}
    return {name for name in found if name[0] == "hotloop"}


def imported_rooms(path: Path, text: str) -> set[str]:
    return {name[1] if len(name) > 1 else "__init__" for name in imported(path, text)}


def wrong_arrows(path: Path, text: str) -> list[str]:
    here = room_of(path)
    return [
        f"{path.relative_to(SOURCE)}: {here} -> {room}"
        for room in imported_rooms(path, text)
        if room not in ORDER or ORDER.index(room) > ORDER.index(here)
    ]


TABLE_OF_CONTENTS = SOURCE / "__init__.py"
ENTRY = SOURCE / "__main__.py"
FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p not in (TABLE_OF_CONTENTS, ENTRY)]


def test_every_room_has_its_place():
    assert {room_of(p) for p in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_arrow_points_right(path):
    assert wrong_arrows(path, path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ..train import Trainer",
        "def f():\n    from hotloop.cli.main import main",
        "import hotloop.serve",
        "from .. import train",
        "import hotloop",
    ],
)
def test_a_wrong_arrow_is_seen(line):
    assert wrong_arrows(SOURCE / "memory" / "pool.py", line)


def test_a_right_arrow_is_allowed():
    text = "from ..errors import PoolError\nfrom .layout import BatchLayout\nimport torch\n"
    assert wrong_arrows(SOURCE / "memory" / "pool.py", text) == []


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ("hotloop", *(parts[:-1] if parts[-1] == "__init__" else parts))


def circles(texts: dict[Path, str]) -> list[list[str]]:
    """Modules that reach themselves through what they import, each group of them once.

    ``from .x import y`` is an arrow to ``x`` or, where that is a module, to ``y``; that Python also
    runs the package's ``__init__`` is none.
    """
    modules = {module_of(path): path for path in texts}
    arrows = {}
    for module, path in modules.items():
        arrows[module] = set()
        for name in imported(path, texts[path]):
            target = name if name in modules else name[:-1]
            if target in modules and target != module:
                arrows[module].add(target)

    def reach(start: tuple[str, ...]) -> set[tuple[str, ...]]:
        seen, left = set(), [start]
        while left:
            for target in arrows[left.pop()] - seen:
                seen.add(target)
                left.append(target)
        return seen

    reached = {module: reach(module) for module in modules}
    groups = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in modules
        if module in reached[module]
    }
    return sorted(sorted(".".join(module) for module in group) for group in groups)


@pytest.mark.parametrize("room", sorted({room_of(p) for p in FILES}))
def test_no_circle_inside_a_room(room):
    assert circles({p: p.read_text() for p in FILES if room_of(p) == room}) == []


@pytest.mark.parametrize(
    "back",
    [
        "from .a import f",
        "from . import a",
        "def f():\n    from .a import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import f",
        "import hotloop.memory.a",
    ],
)
def test_a_circle_is_seen(back):
    room = SOURCE / "memory"
    texts = {room / "a.py": "from .b import g", room / "b.py": "from .c import g"}
    assert circles({**texts, room / "c.py": ""}) == []
    names = [f"hotloop.memory.{name}" for name in "abc"]
    assert circles({**texts, room / "c.py": back}) == [names]
