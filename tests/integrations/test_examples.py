"""The examples of each framework run where it is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(path):
    library = path.stem.partition("_")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_integration_has_an_example():
    source = EXAMPLES.parents[1] / "src" / "hotloop" / "integrations"
    rooms = {p.stem for p in source.glob("*.py")} - {"__init__", "lightning_step"}
    assert rooms == {path.stem.partition("_")[0] for path in EXAMPLES.glob("*.py")}
