"""The guide's inference table: predicted for a model and its engines, and measured on an export.

Measured in a fresh process each, because this one holds PyTorch and every candidate.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HotloopError, RunError
from .report import Setting
from .signature import unflatten

if TYPE_CHECKING:
    from ..plan import Plan
    from .artifacts import ArtifactBuilder

_BYTES_OF = {"float32": 1.0, "tf32": 1.0, "bfloat16": 0.5, "int8": 0.25}
_TIMEOUT_S = 300.0

_BASE = """
import sys, time
start = time.perf_counter()
import hotloop.infer, numpy
{imports}
from hotloop.monitor.process import resident_bytes
print(resident_bytes())
"""

_MEASURE = """
import json, sys, time
start = time.perf_counter()
import numpy
from hotloop.infer import load_inference
from hotloop.monitor.process import resident_bytes
runner = load_inference(sys.argv[1])
def batch(size):
    arrays = []
    for spec in runner.inputs:
        shape = [size if n is None else n for n in spec.shape]
        arrays.append(numpy.zeros(shape, spec.dtype))
    return arrays
first = min(runner.exact, default=1) if not runner.by_batch_size else 1
loaded = resident_bytes()
runner.run(batch(first))
first_s = time.perf_counter() - start
once = resident_bytes()
for size in map(int, sys.argv[2:]):
    if runner.setting_for(size) is not None:
        for _ in range(3):
            runner.run(batch(size))
print(json.dumps({
    "loaded_bytes": loaded,
    "first_answer_bytes": once,
    "resident_bytes": resident_bytes(),
    "first_answer_s": first_s,
    "imports_torch": "torch" in sys.modules,
}))
"""


def predicted_memory(
    artifacts: ArtifactBuilder,
    settings: Iterable[Setting],
    batch_size: int,
    plan: Plan | None = None,
) -> dict[str, int | None]:
    """Bytes by the guide's components for a process that serves these engines.

    - ``model_parameters_bytes``: once for each distinct engine file, in its precision (of hotloop's
      own engine as it has packed them); instances share them.
    - ``batch_data_bytes``: inputs and outputs of the batches in flight.
    - ``working_memory_bytes``: of one batch on the eager path (``Budget``), for each instance;
      engines that fuse take less. Where hotloop's own engine is the only one, of its layout.
      ``None`` where the model's course depends on values.
    - ``runtime_base_bytes``: interpreter, numpy and the engines' libraries, measured.
    - ``enclave_overhead_bytes``: from the plan.
    """
    from ..memory import Arguments, Budget
    from ..plan import Plan

    settings = list(settings)
    instances = max(setting.num_instances for setting in settings)
    files = {artifacts.weights_of(setting) for setting in settings}
    own_weights, own_working = artifacts.own_bytes or (0, lambda batch: 0)
    weights = sum(
        own_weights if engine == "hotloop" else int(artifacts.weight_bytes * _BYTES_OF[precision])
        for engine, precision in files
    )
    specs = [*artifacts.signature.inputs, *artifacts.signature.outputs]
    batch = sum(_spec_bytes(spec.dtype, spec.shape, batch_size) for spec in specs)
    working: int | None = None
    if {engine for engine, _ in files} == {"hotloop"}:
        working = own_working(batch_size)
    if working is None:
        with contextlib.suppress(HotloopError, RuntimeError, TypeError, ValueError):
            args, kwargs = unflatten(artifacts.signature.input_structure, artifacts.example)
            x = Arguments(*args, **kwargs)
            budget = Budget.predict(artifacts.model, x, batch_size, phase="infer", plan=plan)
            working = budget.working_memory_bytes
    parts: dict[str, int | None] = {
        "model_parameters_bytes": weights,
        "batch_data_bytes": batch * instances,
        "working_memory_bytes": None if working is None else working * instances,
        "runtime_base_bytes": runtime_base_bytes(frozenset(s.engine for s in settings)),
        "enclave_overhead_bytes": (plan or Plan()).memory.enclave_overhead_bytes or 0,
    }
    return parts | {"total_bytes": sum(value or 0 for value in parts.values())}


def _spec_bytes(dtype: str, shape: tuple[int | None, ...], batch_size: int) -> int:
    import torch

    sizes = [batch_size if size is None else size for size in shape]
    return math.prod(sizes) * int(getattr(torch, dtype).itemsize)


@functools.cache
def runtime_base_bytes(engines: frozenset[str]) -> int | None:
    """Resident bytes of a fresh process with the libraries of these engines and no model."""
    modules = {"hotloop": "numpy", "onnxruntime": "onnxruntime", "openvino": "openvino"}
    needed = sorted({modules.get(engine, "torch") for engine in engines})
    imports = "\n".join(f"import {name}" for name in needed)
    try:
        return int(_child(_BASE.format(imports=imports)))
    except (RunError, ValueError):
        return None


def measure_memory(folder: str | Path, batch_sizes: Iterable[int] = (1, 32, 64)) -> dict[str, Any]:
    """Load an export in a fresh process, answer, and look.

    Returns:
        ``loaded_bytes``, ``first_answer_bytes`` and ``resident_bytes`` (after three batches of each
        size), ``first_answer_s`` (seconds from the first import to the first answer), and
        ``imports_torch``.

    Raises:
        RunError: the export does not answer.
    """
    return dict(json.loads(_child(_MEASURE, str(folder), *map(str, batch_sizes))))


def _child(code: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError("the measuring process must end", got=f"{_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise RunError(
            "the measuring process must answer", got=(done.stderr.strip().splitlines() or [""])[-1]
        )
    return done.stdout
