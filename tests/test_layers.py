"""The rooms import one way: a room may import itself and the rooms to its left."""

import ast
from pathlib import Path

import pytest

import hotloop

SOURCE = Path(hotloop.__file__).parent
ORDER = [
    "version", "errors", "units", "files", "machine", "kernels", "measure", "plan", "monitor",
    "memory", "data", "step", "parallel", "tuning", "train", "infer", "enclave", "serve", "report",
    "bench", "launch", "cli",
]  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path, text: str) -> set[str]:
    """Rooms that the file imports anywhere, inside functions too."""
    package = ["hotloop", *path.relative_to(SOURCE).parent.parts]
    rooms = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        rooms |= {t[1] if len(t) > 1 else "__init__" for t in targets if t[0] == "hotloop"}
    return rooms


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
