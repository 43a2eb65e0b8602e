"""What ``scripts/check`` chooses to run, and its record."""

import datetime
import json
from pathlib import Path

import pytest

import check_record
import check_rooms

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("changed", "rooms"),
    [
        (["src/hotloop/data/idx.py"], ["data"]),
        (["src/hotloop/kernels/cpp/gemm.cpp", "tests/step/test_step.py"], ["kernels", "step"]),
        (["src/hotloop/errors.py", "README.md", "tests/support/serving.py"], []),
        (["src/hotloop/no_such_room/file.py", "tests/test_layers.py"], []),
    ],
)
def test_the_rooms_that_changed_are_chosen(changed, rooms):
    chosen = check_rooms.chosen_tests(changed, ROOT)
    assert "tests/test_layers.py" in chosen
    assert [path for path in chosen if not path.endswith(".py")] == [f"tests/{r}" for r in rooms]
    assert all((ROOT / path).exists() for path in chosen)


def test_the_record_tells_when_and_how_long(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="30" skipped="4"/></testsuites>'
    )
    record = check_record.record_of(tmp_path, ["lint=2", "tests=100", "smoke=18"])
    assert record["tests"] == {"passed": 26, "skipped": 4}
    assert record["stages_s"] == {"lint": 2, "tests": 100, "smoke": 18}
    path = tmp_path / "check.json"
    path.write_text(json.dumps(record))
    later = datetime.datetime.fromisoformat(record["passed_at"]) + datetime.timedelta(days=3)
    assert "last passed 3.0 days ago" in check_record.told(path, later)
    assert "in 2 min" in check_record.told(path, later)
    assert "no record" in check_record.told(tmp_path / "none", later)
