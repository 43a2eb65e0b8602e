"""Inference on a CUDA device: one captured graph for each batch size, behind the same call.

A call of a small model is bound by launching its kernels; a replay launches all of them at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Which kernels are in the graph,
eager's or those that the compiler has fused, is raced as on a CPU.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..step.cuda_graph import record
from .artifacts import ArtifactBuilder
from .capture import LowerPrecision
from .check import FLOAT32_ERROR
from .engine import Engine, TensorSpec, check_arrays
from .report import Setting
from .signature import Signature

GRAPH, COMPILED_GRAPH = "cuda graph", "cuda graph of inductor"
CUDA_ENGINES = (GRAPH, COMPILED_GRAPH)
# Each captured graph holds the activations of its batch size.
MAX_GRAPHS = 16
# Of float32 products with ten bits behind the point, added over some layers.
TF32_ERROR = 2e-3

# Flat tensors to flat results.
Call = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class CudaEngine:
    """A model on a CUDA device; batch sizes seen before are one launch.

    Calls from several threads and streams are taken one after the other: a graph has one set of
    buffers.

    Args:
        call: the model; its tensors are on the device.
        signature: of the model.
        device: such as ``cuda:0``.
        setting: what this engine is.
    """

    num_threads = 1
    num_instances = 1

    def __init__(
        self,
        call: Call,
        signature: Signature,
        device: torch.device,
        setting: Setting,
    ) -> None:
        self.name = setting.engine
        self.precision = setting.precision
        self.inputs, self.outputs = signature.inputs, signature.outputs
        self._call: Call | None = call
        self._device = device
        self._lock = threading.Lock()
        self._stream: Any = None
        self._graphs: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """See ``Engine.run``: there and back through host memory."""
        check_arrays(self.inputs, arrays)
        tensors = [torch.as_tensor(array) for array in arrays]
        return [tensor.cpu().numpy() for tensor in self.run_tensors(tensors)]

    def run_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors in, from any device; new tensors on the engine's device out, not waited for."""
        with self._lock, torch.cuda.device(self._device):
            self._follow()
            key = tuple(tensor.shape for tensor in tensors)
            held = self._graphs.get(key)
            if held is None:
                held = self._graphs[key] = self._capture(tensors)
                if len(self._graphs) > MAX_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            graph, buffers, results = held
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor.detach(), non_blocking=True)
            graph.replay()
            # The graph writes the same memory at the next call.
            return [result.clone() for result in results]

    def wait(self) -> None:
        """Until the results of this thread's calls are there."""
        torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """See ``Engine.close``."""
        with self._lock:
            self._graphs.clear()
            self._call = None

    def _follow(self) -> None:
        """The buffers are free when the stream of the call before has come so far."""
        stream = torch.cuda.current_stream()
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _capture(self, tensors: Sequence[torch.Tensor]) -> tuple[Any, list[Any], list[Any]]:
        call = self._call
        assert call is not None, "a closed engine is not called"
        buffers = [tensor.detach().to(self._device, copy=True) for tensor in tensors]
        products = _tf32() if self.precision == "tf32" else contextlib.nullcontext()
        with torch.inference_mode(), products, warnings.catch_warnings():
            # The compiler recommends TF32, which is raced under its own name.
            warnings.simplefilter("ignore")
            graph, results = record(lambda: call(buffers))
        return graph, buffers, list(results)


class CudaArtifactBuilder(ArtifactBuilder):
    """Makes engines of a model on a CUDA device; none of them has a file.

    Args:
        device: where model and example are. Others: see ``ArtifactBuilder``.
    """

    def __init__(
        self,
        model: nn.Module,
        signature: Signature,
        example: Sequence[torch.Tensor],
        device: torch.device,
    ) -> None:
        super().__init__(model, signature, example)
        self._device = device
        self._has_run: set[str] = set()

    @property
    def float32_error(self) -> float:
        """PyTorch's default takes TF32 for convolutions on a GPU; so do eager and each candidate,
        and add in another order."""
        backends: Any = torch.backends
        settings = {backends.fp32_precision, backends.cuda.matmul.fp32_precision}
        if any(isinstance(part, nn.modules.conv._ConvNd) for part in self.model.modules()):
            settings |= {backends.cudnn.fp32_precision, backends.cudnn.conv.fp32_precision}
        return TF32_ERROR if "tf32" in settings else FLOAT32_ERROR

    def fixed_batch_of(self, setting: Setting) -> int | None:
        """None: another size is another graph."""
        return None

    def must_compile(self, setting: Setting) -> bool:
        """See ``ArtifactBuilder.must_compile``."""
        return setting.engine == COMPILED_GRAPH and setting.precision not in self._has_run

    def build(self, setting: Setting) -> Engine:
        """An engine with these settings; what it runs is compiled at its first call."""
        signature = self.signature
        call: Call
        if setting.precision == "bfloat16":
            lower: nn.Module = self._once(
                "bfloat16",
                lambda: LowerPrecision(self.model, torch.bfloat16, signature).eval(),
            )
            call = lambda tensors: lower(*tensors)  # noqa: E731
        else:
            call = lambda tensors: signature.call(self.model, tensors)  # noqa: E731
        if setting.engine == COMPILED_GRAPH:
            self._has_run.add(setting.precision)
            call = _compiled(call, signature.inputs)
        return CudaEngine(call, signature, self._device, setting)

    def weights_of(self, setting: Setting) -> tuple[str, str]:
        """See ``ArtifactBuilder.weights_of``."""
        return "cuda", "bfloat16" if setting.precision == "bfloat16" else "float32"

    def program(self, precision: str = "float32") -> Any:
        """Refused: what is in a graph lives on its device.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "an export is made of a model on the CPU", got=str(self._device),
            next_step="compile model.cpu() and save that",
        )  # fmt: skip


def cuda_settings(engines: Sequence[str], allow_lower: bool) -> list[Setting]:
    """All candidates of a race on a CUDA device."""
    precisions = ["float32", "tf32", "bfloat16"] if allow_lower else ["float32"]
    return [Setting(engine=name, precision=p) for p in precisions for name in engines]


def _compiled(call: Call, inputs: Sequence[TensorSpec]) -> Call:
    """The same through the compiler, which is told that the batch may be of any size."""
    compiled: Callable[..., Sequence[torch.Tensor]] | None = None

    def run(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(lambda *given: tuple(call(given)))
        for tensor, spec in zip(tensors, inputs, strict=True):
            if spec.is_batched:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*tensors)

    return run


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """What is captured inside multiplies float32 in TF32."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
