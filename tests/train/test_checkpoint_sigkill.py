"""Real processes, really killed in the middle of saves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def kill_loop(folder, num_kills, seed):
    script = Path(__file__).parent / "checkpoint_kill_loop.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(num_kills), str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["kills"] == num_kills
    return result


def test_a_killed_writer_loses_nothing_that_it_said_was_saved(tmp_path):
    result = kill_loop(tmp_path, 40, seed=1)
    # Kills that only ever fall between saves would show nothing.
    assert result["mid_save"] >= 5


@pytest.mark.slow
def test_hundreds_of_kills(tmp_path):
    result = kill_loop(tmp_path, 500, seed=2)
    assert result["mid_save"] >= 100
    assert result["newer"] >= 1


def test_killed_at_each_system_call_and_cut_at_each_size(tmp_path):
    """The kernel kills, frees locks, writes short and refuses; not a model of it."""
    script = Path(__file__).parent / "checkpoint_kill_each_call.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["kills"] > 6 * 30
    assert result["bytes"] > 400
