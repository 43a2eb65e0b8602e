"""ONNX Runtime on the CPU. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError, RunError
from ..engine import TensorSpec, check_arrays, first_line, import_library, utf8_path

if TYPE_CHECKING:
    import numpy

# Names of ONNX Runtime's type strings.
_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "int8": "int8",
    "int16": "int16", "int32": "int32", "int64": "int64", "uint8": "uint8",
    "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "bool": "bool",
}  # fmt: skip


def library() -> Any:
    """The module ``onnxruntime``.

    Raises:
        MissingExtraError: not installed. RunError: it cannot be loaded here.
    """
    return import_library("onnxruntime", "an ONNX model", "onnx")


class OnnxRuntimeEngine:
    """An ONNX file in one session, which all instances share.

    Args:
        path: of the ``.onnx`` file.
        num_threads: of ONNX Runtime's own pool, the calling thread included. With 1 each call
            stays on the thread that calls.
        num_instances: see ``Engine``.
        spinning: idle pool threads look for work before they sleep: shorter calls, busy CPUs.
        precision: what the file computes in, for the report.

    Raises:
        MissingExtraError: ``onnxruntime`` is not installed.
        ModelError: the file is no ONNX model that ONNX Runtime can run.
    """

    name = "onnxruntime"

    def __init__(
        self,
        path: str | Path,
        *,
        num_threads: int = 1,
        num_instances: int = 1,
        spinning: bool = True,
        precision: str = "float32",
    ) -> None:
        ort = library()
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        try:
            self._session = ort.InferenceSession(
                utf8_path(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # The library's own types, not one of which is public.
            raise ModelError(f"{path} must be an ONNX model", got=first_line(error)) from None
        self.precision = precision
        self.num_threads = num_threads
        self.num_instances = num_instances
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self._names = [spec.name for spec in self.inputs]
        self._output_names = [spec.name for spec in self.outputs]
        # The session's own binding: the wrapper around it checks each call for devices that a
        # session on the CPU never has, 2 us of the 10 that a small model takes.
        inner = getattr(self._session, "_sess", self._session)
        self._run = inner.run

    def run(self, arrays: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """See ``Engine.run``. Contiguous arrays are read where they lie."""
        try:
            feed = dict(zip(self._names, arrays, strict=True))
            return self._run(self._output_names, feed, None)  # type: ignore[no-any-return]
        except Exception as error:
            check_arrays(self.inputs, arrays)
            raise RunError("ONNX Runtime must answer", got=first_line(error)) from None

    def run_one(self, array: numpy.ndarray) -> numpy.ndarray:
        """``run`` for a model of one input and one output."""
        try:
            return self._run(self._output_names, {self._names[0]: array}, None)[0]  # type: ignore[no-any-return]
        except Exception as error:
            check_arrays(self.inputs, [array])
            raise RunError("ONNX Runtime must answer", got=first_line(error)) from None

    def close(self) -> None:
        """See ``Engine.close``."""
        del self._session, self._run


def _spec(node: Any) -> TensorSpec:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind not in _DTYPES:
        raise ModelError("an input or output must be a dense tensor of numbers", got=node.type)
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(node.name, _DTYPES[kind], shape)
