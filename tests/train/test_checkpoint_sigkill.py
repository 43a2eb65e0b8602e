"""Real processes, really killed in the middle of saves."""

import json
import subprocess
import sys

import pytest

from support import FOLDER


def run(script, *arguments):
    """What the script found; nothing wrong."""
    done = subprocess.run(
        [sys.executable, "-m", f"support.{script}", *map(str, arguments)],
        cwd=FOLDER.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    return result


def kill_loop(folder, num_kills, seed):
    result = run("checkpoint_kill_loop", folder, num_kills, seed)
    assert result["kills"] == num_kills
    return result


def test_a_killed_writer_loses_nothing_that_it_said_was_saved(tmp_path):
    result = kill_loop(tmp_path, 20, seed=1)
    # Kills that only ever fall between saves would show nothing.
    assert result["mid_save"] >= 3


@pytest.mark.full
def test_hundreds_of_kills(tmp_path):
    result = kill_loop(tmp_path, 500, seed=2)
    assert result["mid_save"] >= 100
    assert result["newer"] >= 1


@pytest.mark.full
def test_killed_at_each_system_call_and_cut_at_each_size(tmp_path):
    """The kernel kills, frees locks, writes short and refuses; not a model of it."""
    result = run("checkpoint_kill_each_call", tmp_path)
    assert result["kills"] > 6 * 30
    assert result["bytes"] > 400
