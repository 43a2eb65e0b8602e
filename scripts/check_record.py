"""When ``scripts/check --full`` last passed: written by it, told by ``scripts/check``.

    python scripts/check_record.py write FOLDER STAGE=SECONDS ...
    python scripts/check_record.py tell

FOLDER holds the JUnit reports of the tests.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "check.json"


def git(*arguments: str) -> str:
    """What git prints about this repository; empty where it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def counts(folder: Path) -> dict[str, int]:
    """Tests that ran and tests that were skipped, over all reports in ``folder``."""
    suites = [s for path in folder.glob("*.xml") for s in ElementTree.parse(path).iter("testsuite")]
    skipped = sum(int(suite.get("skipped", 0)) for suite in suites)
    return {"passed": sum(int(s.get("tests", 0)) for s in suites) - skipped, "skipped": skipped}


def write(folder: Path, stages: list[str]) -> None:
    """Write the record of a full check that has just passed."""
    seconds = {name: int(value) for name, value in (stage.split("=") for stage in stages)}
    record = {
        "passed_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "num_cpus": len(os.sched_getaffinity(0)),
        "tests": counts(folder),
        "stages_s": seconds,
        "total_s": sum(seconds.values()),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"hotloop: wrote {RECORD.relative_to(ROOT)}")


def told() -> str:
    """One line about the record."""
    if not RECORD.is_file():
        return "scripts/check --full has no record of having passed"
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    passed_at = datetime.datetime.fromisoformat(record["passed_at"])
    age_days = (datetime.datetime.now(datetime.UTC) - passed_at).total_seconds() / 86400
    since = git("rev-list", "--count", f"{record['commit']}..HEAD") or "unknown"
    return (
        f"scripts/check --full last passed {age_days:.1f} days ago, {since} commits back, "
        f"in {record['total_s'] / 60:.0f} min"
    )


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), sys.argv[3:])
    else:
        print(f"hotloop: {told()}")
