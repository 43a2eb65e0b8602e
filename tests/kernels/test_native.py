"""The C++ by itself under sanitizers: programs in ``native/``, without Python and torch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hotloop.machine import Machine
from support.levels import usable_levels

ROOT = Path(__file__).parents[2]
TOOLS = ("cmake", "ninja", "g++")
NUMERIC = ("images_check", "layers_check", "products_check", "training_check")
USABLE = usable_levels()

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
    pytest.mark.skipif(not USABLE, reason="no kernels for this processor"),
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


def programs(folder: Path, level: str, sanitize: str = "", *options: str) -> Path:
    """A folder set up to build the programs for a level; where they will lie."""
    run(
        "cmake", "-G", "Ninja", "-S", ".", "-B", str(folder), "-DHOTLOOP_CHECK=ON",
        f"-DHOTLOOP_LEVELS={level}", f"-DHOTLOOP_SANITIZE={sanitize}", *options,
    )  # fmt: skip
    return folder / "tests" / "kernels" / "native"


def built(where: Path, program: str) -> str:
    run("cmake", "--build", str(where.parents[2]), "--target", program)
    return str(where / program)


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return programs(tmp_path_factory.mktemp("native"), USABLE[0].name, request.param)


@pytest.mark.parametrize("program", ["arena_check", "rows_check", "team_check", *NUMERIC])
def test_sanitizers_find_nothing_wrong(sanitized: Path, program: str) -> None:
    run(built(sanitized, program))


@pytest.fixture(scope="module", params=[level.name for level in USABLE[1:]])
def lower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lower level has vectors of another width."""
    return programs(tmp_path_factory.mktemp("native"), request.param, "address,undefined")


@pytest.mark.parametrize("program", NUMERIC)
def test_lower_levels_under_sanitizers(lower: Path, program: str) -> None:
    run(built(lower, program))


def test_the_best_level_as_it_is_shipped(tmp_path: Path) -> None:
    where = programs(tmp_path, USABLE[0].name)
    for program in NUMERIC:
        run(built(where, program))


@pytest.mark.skipif(Machine.probe().architecture != "x86_64", reason="a level of x86-64")
def test_products_in_bfloat16_compile_and_run_where_the_processor_can(tmp_path: Path) -> None:
    level = "x86-64-v4-bf16"
    program = built(programs(tmp_path, level), "products_check")
    if level in [usable.name for usable in USABLE]:
        run(program)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs for aarch64, without libraries of their own."""
    if not all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))):
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user-static")
    return programs(
        tmp_path_factory.mktemp("native"), "aarch64", "", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip


@pytest.mark.parametrize("program", ["rows_check", *NUMERIC])
def test_aarch64_under_emulation(emulated: Path, program: str) -> None:
    run("qemu-aarch64-static", built(emulated, program))
