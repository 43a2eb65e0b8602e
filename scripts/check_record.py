"""When ``scripts/check --full`` last passed: written by it, told by ``scripts/check``.

    python scripts/check_record.py write FOLDER STAGE=SECONDS ...
    python scripts/check_record.py tell

FOLDER holds the JUnit report of the tests, ``tests.xml``.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "check.json"


def git(*arguments: str) -> str:
    """What git prints about this repository; empty where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def counts(folder: Path) -> dict[str, int]:
    """Tests that passed and tests that were skipped."""
    suites = list(ElementTree.parse(folder / "tests.xml").iter("testsuite"))
    total, skipped = (sum(int(s.get(n, 0)) for s in suites) for n in ("tests", "skipped"))
    return {"passed": total - skipped, "skipped": skipped}


def record_of(folder: Path, stages: list[str]) -> dict[str, Any]:
    """The record of a full check that has just passed; ``stages``: ``name=seconds``."""
    seconds = {name: int(value) for name, value in (stage.split("=") for stage in stages)}
    return {
        "passed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "num_cpus": len(os.sched_getaffinity(0)),
        "tests": counts(folder),
        "stages_s": seconds,
        "total_s": sum(seconds.values()),
    }


def told(path: Path, now: datetime.datetime) -> str:
    """One line about the record at ``path``."""
    if not path.is_file():
        return "scripts/check --full has no record of having passed"
    record = json.loads(path.read_text(encoding="utf-8"))
    age = now - datetime.datetime.fromisoformat(record["passed_at"])
    age_days = age.total_seconds() / 86400
    since = git("rev-list", "--count", f"{record['commit']}..HEAD") or "unknown"
    return (
        f"scripts/check --full last passed {age_days:.1f} days ago, {since} commits back, "
        f"in {record['total_s'] / 60:.0f} min"
    )


if __name__ == "__main__":
    if sys.argv[1] == "write":
        record = record_of(Path(sys.argv[2]), sys.argv[3:])
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"hotloop: {told(RECORD, datetime.datetime.now(datetime.UTC))}")
