"""The C++ by itself under sanitizers: programs in ``native/``, without Python and torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("cmake", "ninja", "g++")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


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


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder set up to build the programs with these sanitizers."""
    folder: Path = tmp_path_factory.mktemp("native")
    run(
        "cmake", "-G", "Ninja", "-S", ".", "-B", str(folder), "-DHOTLOOP_CHECK=ON",
        f"-DHOTLOOP_SANITIZE={request.param}",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("program", ["arena_check", "rows_check", "team_check"])
def test_a_program_finds_nothing_wrong(build: Path, program: str) -> None:
    run("cmake", "--build", str(build), "--target", program)
    run(str(build / "tests" / "kernels" / "native" / program))
