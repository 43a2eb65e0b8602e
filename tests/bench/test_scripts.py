"""The scripts of ``benchmarks/``: what they take from hotloop is there."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from hotloop import MissingExtraError

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


def taken(tree):
    """Module and name of each import from hotloop, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hotloop":
            for alias in node.names:
                yield node.module, alias.name


def is_there(module, name):
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


def test_there_are_scripts():
    assert len(SCRIPTS) > 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_imports_of_a_script_resolve(script):
    try:
        missing = [each for each in taken(ast.parse(script.read_text())) if not is_there(*each)]
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert not missing
