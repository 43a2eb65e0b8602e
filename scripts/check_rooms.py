"""Print what ``scripts/check --fast`` tests: the rooms that changed since main.

A change counts whether it is committed or not. Rooms that import a changed room are not among
them: what a change breaks there, ``scripts/check`` finds.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def changed_files(root: Path) -> list[str]:
    """Paths that differ from where this branch left main, and files that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.splitlines() if done.returncode == 0 else []

    base = git("merge-base", "main", "HEAD") or ["HEAD"]  # A clone may have no main.
    return git("diff", "--name-only", base[0]) + git("ls-files", "--others", "--exclude-standard")


def chosen_tests(changed: Iterable[str], root: Path) -> list[str]:
    """Arguments for pytest: the tests outside rooms (layers, exports), and the changed rooms'."""
    rooms = set()
    for path in map(Path, changed):
        if path.parts[:2] == ("src", "hotloop") and len(path.parts) > 3:
            rooms.add(path.parts[2])
        elif path.parts[:1] == ("tests",) and len(path.parts) > 2:
            rooms.add(path.parts[1])
    beside = sorted(path.relative_to(root).as_posix() for path in root.glob("tests/test_*.py"))
    return beside + [
        f"tests/{room}" for room in sorted(rooms) if any(root.glob(f"tests/{room}/**/test_*.py"))
    ]


if __name__ == "__main__":
    print("\n".join(chosen_tests(changed_files(ROOT), ROOT)))
