"""A compiled step as a callable: load, bind to tensors, run one step or many in one call."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..errors import RunError
from ..kernels import binding
from ..machine import Machine
from ..machine.cache_dir import STEPS
from .capture import Captured
from .compiler import compiler
from .graph_file import to_values

_TIME_LIMIT_S = 900.0
_ENTRIES = ("AOTInductorModelContainerCreateWithDevice", "AOTInductorModelContainerRun")
_DTYPE_CODES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4,
    torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip


@functools.cache
def _machine_key() -> str:
    # Compiled for this processor, against these entries of these kernels.
    built = kernels.build_hash() if kernels.is_available() else "none"
    return f"{Machine.probe().fingerprint()}-{binding.binding_hash()[:8]}-{built[:8]}"


def compiled_path(captured: Captured, num_threads: int) -> Path:
    """Where the compiled step of this graph lies, or would lie, for this machine."""
    facts = [captured.key, torch.__version__, str(num_threads), platform.machine()]
    shapes = _shapes_key(captured.weights, captured.example[-2:])
    name = "-".join([_machine_key(), shapes, *facts])
    return STEPS.path(name)


def working_bytes(library: Path) -> int | None:
    """What a compiled step takes beside its inputs, as noted when it was compiled."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(library.with_suffix(".json").read_text())["working_bytes"])
    return None


def _shapes_key(weights: Sequence[torch.Tensor], batch: Sequence[torch.Tensor]) -> str:
    facts = [tuple(w.shape) for w in weights], [(*t.shape, *t.stride(), t.dtype) for t in batch]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def compile_captured(captured: Captured, num_threads: int) -> Path:
    """Compile in another process, or find it compiled; one after the other where two want it.

    Raises:
        RunError: there is no compiler, or it refused; the first line of why.
    """
    target = compiled_path(captured, num_threads)
    if target.is_file():
        return target
    cxx = compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hotloop-request-") as folder:
        request = Path(folder) / "request.pickle"
        values = pickle.dumps(
            {
                "graph": to_values(captured.graph),
                "inputs": [(tuple(t.shape), t.stride(), t.dtype) for t in captured.example],
                "num_threads": num_threads,
                "options": {},
            }
        )
        request.write_bytes(values)
        done = subprocess.run(
            [sys.executable, "-m", "hotloop.step.compile_worker", str(request), str(target)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIME_LIMIT_S,
            env=os.environ | {"CXX": cxx, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=False,
        )
    if done.returncode != 0 or not target.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunError("the step must compile", got=lines[-1][:300])
    return target


def load_step(path: Path) -> Any:
    """Entries of a compiled step, as ``binding.CompiledStep``.

    Its library stays loaded for good: it has code that threads may be in.

    Raises:
        RunError: it does not load, or there are no kernels here.
    """
    kernels.use_torch()
    try:
        library = ctypes.CDLL(str(path))
        entries = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _ENTRIES]
    except (OSError, AttributeError) as error:
        raise RunError("a compiled step must load", got=error) from None
    return binding.CompiledStep(*entries)


class Program:
    """A compiled step bound to tensors.

    Args:
        path: the compiled library.
        num_threads: threads of hotloop's own kernels.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        opened = ctypes.c_void_p()
        kernels.call("hotloop_program_open", ctypes.byref(load_step(path)), ctypes.byref(opened))
        self._handle = opened
        self._run = binding.ProgramRun(num_threads=num_threads)
        self._bound: list[torch.Tensor] = []
        self._batch_key: Any = None

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        control: torch.Tensor,
        counters: Sequence[torch.Tensor],
    ) -> None:
        """Fix all inputs but the batch; ``control`` is the last of ``tensors``.

        Raises:
            RunError: one of them is no dense tensor on the CPU.
        """
        self._bound = [*tensors, *counters]  # Kept alive: the program holds addresses.
        self._counters = addresses(counters)
        run = self._run
        run.control, run.table_bytes = control.data_ptr(), control.nbytes
        run.counters, run.num_counters = ctypes.addressof(self._counters), len(counters)
        specs = TensorSpecs(tensors)
        kernels.call("hotloop_program_bind", self._handle, specs.array, len(tensors))

    def run(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        tables: torch.Tensor | None,
        steps: int = 1,
    ) -> torch.Tensor:
        """Run ``steps`` steps; batch i is rows ``[i*rows, (i+1)*rows)`` of x and y.

        Args:
            x, y: ``[steps * rows, ...]``.
            tables: ``[steps, ...]``, each like ``control``, which it overwrites before its step;
                ``None``: ``control`` stays.

        Returns:
            The losses, float32 ``[steps]``.

        Raises:
            RunError: the compiled step failed.
        """
        rows = len(x) // steps
        losses = torch.empty(steps)
        run = self._run
        key = (rows, x.shape[1:], x.stride(), x.dtype, y.shape[1:], y.stride(), y.dtype)
        if key != self._batch_key:
            self._batch_key = key
            self._batch = TensorSpecs((x[:rows], y[:rows]))
            run.x, run.y = self._batch.array
            run.x_step_bytes = rows * x.stride(0) * x.element_size()
            run.y_step_bytes = rows * y.stride(0) * y.element_size()
        run.x.data, run.y.data = x.data_ptr(), y.data_ptr()
        run.steps, run.losses = steps, losses.data_ptr()
        run.tables = None if tables is None else tables.data_ptr()
        kernels.call("hotloop_program_run", self._handle, ctypes.byref(run))
        return losses

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            kernels.library().hotloop_program_close(handle)


class TensorSpecs:
    """Tensors as the C++ side takes them; keeps their sizes and strides, not the tensors.

    Attributes:
        array: ``binding.TensorSpec`` for each.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        numbers = [number for t in tensors for number in (*t.shape, *t.stride())]
        self._numbers = (ctypes.c_int64 * max(1, len(numbers)))(*numbers)
        self.array = (binding.TensorSpec * len(tensors))()
        at = ctypes.addressof(self._numbers)
        for spec, t in zip(self.array, tensors, strict=True):
            dims_bytes = ctypes.sizeof(ctypes.c_int64) * t.dim()
            spec.data, spec.dims, spec.dtype = t.data_ptr(), t.dim(), _DTYPE_CODES[t.dtype]
            spec.sizes, spec.strides = at, at + dims_bytes
            at += 2 * dims_bytes


def addresses(tensors: Sequence[torch.Tensor]) -> Any:
    """Where tensors lie, as an array of pointers."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
