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
from torch import nn

from ..errors import RunError
from ..machine import Machine, native
from ..machine.cache_dir import STEPS
from .capture import Captured
from .graph_file import to_values
from .updates import COLUMNS

_FOLDER = Path(__file__).parent / "kernels"
_TIME_LIMIT_S = 900.0
# Raised when the meaning of a compiled step's inputs changes.
_FORMAT = 3
_DTYPE_CODES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4,
    torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip


@functools.cache
def kernels() -> ctypes.CDLL:
    """hotloop's own kernels and the loop over compiled steps, built for this machine.

    Raises:
        RunError: no C++ compiler, or it refused.
    """
    library = native.load(
        _FOLDER / "shim.cpp",
        parts=tuple(sorted(set(_FOLDER.iterdir()) - {_FOLDER / "shim.cpp"})),
        flags=(
            "-march=native",
            "-fopenmp",
            "-fno-math-errno",
            "-mprefer-vector-width=512",
            f"-L{Path(torch.__file__).parent / 'lib'}",
            "-ltorch_cpu",
            # Another processor that shares this cache builds its own.
            f"-DHOTLOOP_MACHINE={_machine_key()}",
        ),
        mode=ctypes.RTLD_GLOBAL,
    )
    library.hotloop_scratch_bytes.restype = ctypes.c_int64
    library.hotloop_program_open.restype = ctypes.c_void_p
    library.hotloop_program_close.argtypes = [ctypes.c_void_p]
    return library


@functools.cache
def _machine_key() -> str:
    return Machine.probe().fingerprint()


def compiled_path(captured: Captured, num_threads: int) -> Path:
    """Where the compiled step of this graph lies, or would lie, for this machine."""
    facts = [captured.key, torch.__version__, str(num_threads), str(_FORMAT), platform.machine()]
    shapes = _shapes_key(captured.weights, captured.example[-2:])
    name = "-".join([_machine_key(), shapes, *facts])
    return STEPS.path(name)


def working_bytes(library: Path) -> int | None:
    """What a compiled step takes beside its inputs, as noted when it was compiled."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(library.with_suffix(".json").read_text())["working_bytes"])
    return None


def may_be_compiled(model: nn.Module, batch: Sequence[torch.Tensor]) -> bool:
    """Whether the cache holds a step of such weights on such a batch: a look before capturing."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return any(STEPS.found(f"{_machine_key()}-{_shapes_key(weights, batch)}-*"))


def _shapes_key(weights: Sequence[torch.Tensor], batch: Sequence[torch.Tensor]) -> str:
    facts = [tuple(w.shape) for w in weights], [(*t.shape, *t.stride(), t.dtype) for t in batch]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def compile_captured(captured: Captured, num_threads: int) -> Path:
    """Compile in another process, or find it compiled; one after the other where two want it.

    Raises:
        RunError: the compiler refused; the first line of why.
    """
    target = compiled_path(captured, num_threads)
    if target.is_file():
        return target
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
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=False,
        )
    if done.returncode != 0 or not target.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RunError("the step must compile", got=lines[-1][:300])
    return target


class UpdateRule(ctypes.Structure):
    """``hotloop_update`` of ``kernels/gemm.h``."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("first_step", ctypes.c_int32),
        *((name, ctypes.c_double) for name in COLUMNS if name not in ("kind", "first_step")),
    )


class Program:
    """A compiled step bound to tensors.

    Args:
        path: the compiled library.
        num_threads: threads of hotloop's own kernels.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        self._library = kernels()
        self._num_threads = num_threads
        message = ctypes.create_string_buffer(400)
        opened = self._library.hotloop_program_open(str(path).encode(), message, 400)
        if not opened:
            raise RunError("a compiled step must load", got=message.value.decode(errors="replace"))
        self._handle = ctypes.c_void_p(opened)
        self._bound: list[torch.Tensor] = []
        self._counters: Any = None
        self._batch_key: Any = None

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        control: torch.Tensor,
        counters: Sequence[torch.Tensor],
    ) -> None:
        """Fix all inputs but the batch; ``control`` is the last of ``tensors``."""
        self._bound = [*tensors]  # Kept alive: the program holds addresses.
        self._control = control
        self._steps = list(counters)
        self._counters = (ctypes.c_void_p * max(1, len(counters)))(
            *(c.data_ptr() for c in counters)
        )
        table = described(tensors)
        if self._library.hotloop_program_bind(self._handle, table, len(tensors)):
            raise RunError("the inputs of a compiled step must be dense tensors")

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
        """
        rows = len(x) // steps
        losses = torch.empty(steps)
        key = (rows, x.shape[1:], x.stride(), x.dtype, y.shape[1:], y.stride(), y.dtype)
        if key != self._batch_key:
            self._batch_key = key
            self._batch = described((x[:rows], y[:rows]))
            self._y_at = 3 + 2 * x.dim()
        self._batch[0], self._batch[self._y_at] = x.data_ptr(), y.data_ptr()
        self._library.hotloop_set_threads(self._num_threads)
        failed = self._library.hotloop_program_run(
            self._handle,
            self._batch,
            ctypes.c_int64(rows * x.stride(0) * x.element_size()),
            ctypes.c_int64(rows * y.stride(0) * y.element_size()),
            ctypes.c_int64(steps),
            ctypes.c_void_p(None if tables is None else tables.data_ptr()),
            ctypes.c_void_p(self._control.data_ptr()),
            ctypes.c_int64(self._control.nbytes),
            ctypes.c_void_p(losses.data_ptr()),
            self._counters,
            ctypes.c_int64(len(self._steps)),
        )
        if failed:
            raise RunError("the compiled step failed", next_step="set plan step.compile to 'off'")
        return losses

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None:
            self._library.hotloop_program_close(handle)


def described(tensors: Sequence[torch.Tensor]) -> Any:
    """Tensors as the C++ side takes them: address, dtype code, dimensions, sizes, strides."""
    numbers: list[int] = []
    for t in tensors:
        numbers += [t.data_ptr(), _DTYPE_CODES[t.dtype], t.dim(), *t.shape, *t.stride()]
    return (ctypes.c_int64 * len(numbers))(*numbers)
