"""The same call for a model on a CUDA device: one captured graph for each batch size.

Not run on a device yet: written by PyTorch's documentation on a machine without one. What needs no
device (the choice of the path, the bounded set of graphs) is tested.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .capture import Signature, own_copy, read_signature
from .check import FLOAT32_ERROR, difference, fresh_inputs
from .engine import TensorSpec, check_arrays
from .report import InferenceReport, RaceRow, Setting
from .runner import InferenceRunner

# Each captured graph holds the activations of its batch size.
MAX_GRAPHS = 16
_WARM_UPS = 3


class CudaEngine:
    """A module on a CUDA device; batch sizes seen before are one launch.

    Args:
        model: in eval mode, the engine's own, on the device.
        device: such as ``"cuda:0"``.
    """

    name = "cuda graph"
    precision = "float32"
    num_threads = 1
    # A graph has one set of buffers.
    num_instances = 1

    def __init__(self, model: nn.Module, signature: Signature, device: torch.device) -> None:
        self.inputs: tuple[TensorSpec, ...] = signature.inputs
        self.outputs: tuple[TensorSpec, ...] = signature.outputs
        self._model = model
        self._signature = signature
        self._device = device
        self._graphs: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """See ``Engine.run``: there and back through host memory."""
        check_arrays(self.inputs, arrays)
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        return [tensor.cpu().numpy() for tensor in self.run_tensors(tensors)]

    def run_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors on the device in, new tensors on the device out."""
        key = tuple(tensor.shape for tensor in tensors)
        if key not in self._graphs:
            self._graphs[key] = self._capture(tensors)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, buffers, results = self._graphs[key]
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        graph.replay()
        # The graph writes the same memory at the next call.
        return [result.clone() for result in results]

    def _capture(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, list[Any], list[Any]]:
        buffers = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            # Libraries choose kernels and take workspace now, outside the graph.
            for _ in range(_WARM_UPS):
                self._signature.call(self._model, buffers)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            results = self._signature.call(self._model, buffers)
        return graph, buffers, results

    def close(self) -> None:
        """See ``Engine.close``."""
        self._graphs.clear()
        del self._model


def compile_for_cuda(model: nn.Module, example: Any, goal: str, device: str) -> InferenceRunner:
    """``compile_inference`` for a model on a CUDA device.

    Raises:
        InputError: this PyTorch has no device.
    """
    if not torch.cuda.is_available():
        raise InputError("a model on a CUDA device needs one", got="no device")
    start = time.perf_counter()
    twin = own_copy(model)
    where = next(iter(twin.parameters())).device
    signature, tensors = read_signature(twin, example)
    engine = CudaEngine(twin, signature, where)
    inputs = fresh_inputs(tensors, signature.inputs, len(tensors[0]), seed=1)
    inputs = [tensor.to(where) for tensor in inputs]
    with torch.inference_mode():
        want = signature.call(twin, inputs)
    error, why = difference(engine.run_tensors(inputs), want)
    if why or not error <= FLOAT32_ERROR:
        raise InputError("the captured graph must give what eager gives", got=why or error)
    setting = Setting(engine=engine.name)
    row = RaceRow(setting=setting, batch_size=len(tensors[0]), error=error, won=True)
    report = InferenceReport(goal=goal, rows=[row], winners={1: setting})
    report.elapsed_s = time.perf_counter() - start
    return InferenceRunner(
        {setting: engine}, {1: setting}, signature.inputs, signature.outputs,
        signature.input_structure, signature.output_structure, report, primary=setting,
    )  # fmt: skip
