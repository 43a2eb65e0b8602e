"""The team of threads under sanitizers, in C++ alone: they do not know the threads of torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("cmake", "ninja", "g++")


def run(*command: str) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CXX": "g++"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.mark.full
@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}")
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_a_team_makes_exact_sums_without_races(sanitizers: str, tmp_path: Path) -> None:
    run(
        "cmake", "-G", "Ninja", "-S", ".", "-B", str(tmp_path), "-DHOTLOOP_CHECK=ON",
        f"-DHOTLOOP_SANITIZE={sanitizers}",
    )  # fmt: skip
    run("cmake", "--build", str(tmp_path), "--target", "team_check")
    run(str(tmp_path / "team_check"))
