"""OpenVINO on the CPU. Imports no torch."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError, RunError
from ..engine import TensorSpec, check_arrays, import_library, utf8_path
from .signal_stack import signal_stack_kept

if TYPE_CHECKING:
    import numpy

_PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


def library() -> Any:
    """The module ``openvino``.

    Raises:
        MissingExtraError: not installed. RunError: it cannot be loaded here.
    """
    return import_library("openvino", "an OpenVINO model", "openvino")


class OpenVinoEngine:
    """An ``.xml`` (or ``.onnx``) file, compiled once; each instance has a request of its own.

    Args:
        path: of the model's file.
        num_threads: inside one call.
        num_instances: OpenVINO's streams. They share the weights.
        precision: ``"bfloat16"`` lets OpenVINO compute in it; ``"int8"`` says that the file is
            quantized.

    Raises:
        MissingExtraError: ``openvino`` is not installed.
        ModelError: the file is no model that OpenVINO can compile.
    """

    name = "openvino"

    def __init__(
        self,
        path: str | Path,
        *,
        num_threads: int = 1,
        num_instances: int = 1,
        precision: str = "float32",
    ) -> None:
        ov = library()
        settings = {
            "INFERENCE_NUM_THREADS": num_threads * num_instances,
            "NUM_STREAMS": str(num_instances),
            "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY" if num_instances == 1 else "THROUGHPUT",
        }
        try:
            model = ov.Core().read_model(utf8_path(path))
            with signal_stack_kept():
                compiled = ov.Core().compile_model(model, "CPU", settings)
            requests = [compiled.create_infer_request() for _ in range(num_instances)]
        except Exception as error:  # The library raises RuntimeError for all that is wrong.
            raise ModelError(f"{path} must be an OpenVINO model", got=_line(error)) from None
        self.precision = precision
        self.num_threads = num_threads
        self.num_instances = num_instances
        self.inputs = tuple(_spec(port, i, "input") for i, port in enumerate(compiled.inputs))
        self.outputs = tuple(_spec(port, i, "output") for i, port in enumerate(compiled.outputs))
        self._tensor = ov.Tensor
        self._compiled = compiled
        # What a request gives lies in memory of its own until the next call: taken, not shared.
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for request in requests:
            self._requests.put(request)
        self._ports = list(range(len(self.outputs)))

    def run(self, arrays: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """See ``Engine.run``. Contiguous arrays are read where they lie."""
        # OpenVINO would convert another dtype without a word.
        check_arrays(self.inputs, arrays)
        # One array is its own feed: a mapping would be looked through name by name.
        return self._answer(arrays[0] if len(arrays) == 1 else list(arrays))

    def run_one(self, array: numpy.ndarray) -> numpy.ndarray:
        """``run`` for a model of one input and one output; the caller has checked the array."""
        return self._answer(array)[0]

    def _answer(self, feed: Any) -> list[numpy.ndarray]:
        requests = self._requests
        request = requests.get()
        try:
            request.infer(feed, share_inputs=True, share_outputs=True)
            return [request.get_output_tensor(port).data.copy() for port in self._ports]
        except Exception as error:
            raise RunError("OpenVINO must answer", got=_line(error)) from None
        finally:
            requests.put(request)

    def close(self) -> None:
        """See ``Engine.close``."""
        self._requests = queue.SimpleQueue()
        del self._compiled


def write_model(source: Path, target: Path) -> None:
    """A model file of another kind as ``.xml`` with its ``.bin`` beside, weights as they are."""
    ov = library()
    model = ov.Core().read_model(utf8_path(source))
    ov.save_model(model, utf8_path(target), compress_to_fp16=False)


def _spec(port: Any, position: int, what: str) -> TensorSpec:
    shape = tuple(
        size.get_length() if size.is_static else None for size in port.get_partial_shape()
    )
    names = sorted(port.get_names())
    dtype = str(port.get_element_type().to_dtype().name)
    return TensorSpec(names[0] if names else f"{what}_{position}", dtype, shape)


def _line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line]
    return lines[-1] if lines else type(error).__name__
