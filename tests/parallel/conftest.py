"""The captured machines of ``tests/machine``, for the placement of workers."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "machine" / "conftest.py"
_spec = importlib.util.spec_from_file_location("captured_machines", _PATH)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
captured, probe, write_tree = _module.captured, _module.probe, _module.write_tree
