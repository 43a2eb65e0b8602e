"""What each peer of the inference race does: prepare once, then answer batches.

A peer is a function of a job that gives ``Prepared``; what it computes with is imported inside it,
so that the memory of its process is its own. Its variants are the settings its users are told to
try; the process of a peer that has more than one first times them (``infer_peer``), the race is
run with the fastest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from .shapes import SAMPLE_SHAPES

Call = Callable[[Any], Any]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a peer is asked for.

    Attributes:
        model: a name of ``SAMPLE_SHAPES``. batch_size: samples a call.
        threads: usable CPUs. goal: ``"latency"``: one call at a time; ``"throughput"``: as many
            at the same time as the peer likes.
        folder: has ``weights.npz``, ``x.npy`` (``[batches, batch_size, ...]`` float32) and, for
            the engines that read ONNX, ``model.onnx`` of this batch size.
        settings: one of the peer's variants.
        max_accuracy_loss: for hotloop alone; ``None``: float32.
    """

    model: str
    batch_size: int
    threads: int
    goal: str
    folder: Path
    settings: Settings = field(default_factory=dict)
    max_accuracy_loss: float | None = None

    @property
    def x(self) -> numpy.ndarray:
        """``[batches, batch_size, ...]`` float32."""
        array: numpy.ndarray = numpy.load(self.folder / "x.npy")
        return array


@dataclass(frozen=True)
class Prepared:
    """A peer ready to answer.

    Attributes:
        calls: one for each caller at the same time; takes an input of ``inputs``' kind.
        convert: an array to an input of the peer's own kind.
        to_numpy: an output to an array.
        told: settings that the peer chose itself.
    """

    calls: Sequence[Call]
    convert: Callable[[numpy.ndarray], Any]
    to_numpy: Callable[[Any], numpy.ndarray]
    told: Settings = field(default_factory=dict)


def _streams(threads: int, goal: str) -> list[Settings]:
    """All threads in one call; for throughput, one thread in each of as many calls as well."""
    one = [{"threads": threads, "streams": 1}]
    if threads == 1:
        return one
    if goal == "latency":
        return [*one, {"threads": 1, "streams": 1}]
    return [*one, {"threads": 1, "streams": threads}]


def variants(peer: str, model: str, threads: int, goal: str) -> list[Settings]:
    """The settings that ``peer`` is timed with before the race."""
    if peer in ("pytorch", "torchscript"):
        image = len(SAMPLE_SHAPES[model]) == 3 and model not in ("small", "big")
        layouts = ("contiguous", "channels_last") if image else ("contiguous",)
        return [
            {**streams, "layout": layout}
            for streams in _streams(threads, goal)
            for layout in layouts
        ]
    if peer in ("inductor", "onnxruntime"):
        return _streams(threads, goal)
    if peer == "openvino":
        hint = "LATENCY" if goal == "latency" else "THROUGHPUT"
        first = [{**streams, "hint": "LATENCY"} for streams in _streams(threads, "latency")]
        return first if hint == "LATENCY" else [first[0], {"hint": hint}]
    return [{}]


def _torch_model(job: Job) -> Any:
    import torch

    from .models import build_race_model

    torch.set_num_threads(job.settings.get("threads", job.threads))
    model = build_race_model(job.model)
    with numpy.load(job.folder / "weights.npz") as state:
        model.load_state_dict({name: torch.from_numpy(state[name]) for name in state.files})
    return model


def _torch_prepared(job: Job, call: Call) -> Prepared:
    """``call`` on as many threads as streams; each sets what torch keeps for a thread."""
    import threading

    import torch

    ready = threading.local()
    threads = job.settings["threads"]

    def one(x: Any) -> Any:
        if not hasattr(ready, "mode"):
            torch.set_num_threads(threads)
            ready.mode = torch.inference_mode()
            ready.mode.__enter__()
        return call(x)

    channels_last = job.settings.get("layout") == "channels_last"

    def convert(array: numpy.ndarray) -> Any:
        tensor = torch.from_numpy(array)
        return tensor.to(memory_format=torch.channels_last) if channels_last else tensor

    return Prepared([one] * job.settings["streams"], convert, lambda y: y.numpy(force=True))


def _in_layout(job: Job, model: Any) -> Any:
    import torch

    if job.settings["layout"] == "channels_last":
        model.to(memory_format=torch.channels_last)
    return model


def pytorch(job: Job) -> Prepared:
    """PyTorch eager in inference mode, channels last where that is faster."""
    return _torch_prepared(job, _in_layout(job, _torch_model(job)))


def torchscript(job: Job) -> Prepared:
    """TorchScript: traced, frozen, optimized for inference."""
    import torch

    model = _in_layout(job, _torch_model(job))
    prepared = _torch_prepared(job, model)
    example = prepared.convert(job.x[0])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # That TorchScript is no longer developed.
        frozen = torch.jit.freeze(torch.jit.trace(model, example))
        frozen = torch.jit.optimize_for_inference(frozen)
        for _ in range(3):  # The profiling executor specializes on the first calls.
            frozen(example)
    return _torch_prepared(job, frozen)


def inductor(job: Job) -> Prepared:
    """``torch.compile`` with frozen weights."""
    import torch
    import torch._inductor.config as config

    config.freezing = True
    model = _torch_model(job)
    compiled: Any = torch.compile(model, dynamic=False)
    with torch.inference_mode():
        compiled(torch.from_numpy(job.x[0]))
    return _torch_prepared(job, compiled)


def onnxruntime(job: Job) -> Prepared:
    """ONNX Runtime's CPU provider, all graph optimizations; one session, called by all streams."""
    import onnxruntime as ort  # type: ignore[import-not-found, import-untyped, unused-ignore]

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.settings["threads"]
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        str(job.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def call(x: numpy.ndarray) -> Any:
        return session.run(None, {name: x})[0]

    return Prepared([call] * job.settings["streams"], lambda x: x, lambda y: y)


def openvino(job: Job) -> Prepared:
    """OpenVINO on the CPU in float32; inputs shared, a request for each stream."""
    import openvino as ov  # type: ignore[import-not-found, import-untyped, unused-ignore]

    options: Settings = {
        "PERFORMANCE_HINT": job.settings["hint"],
        # Else it computes in bfloat16 where the CPU can.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": job.settings.get("threads", job.threads),
    }
    core = ov.Core()
    compiled = core.compile_model(str(job.folder / "model.onnx"), "CPU", options)
    wanted = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    streams = job.settings.get("streams", wanted)

    def request() -> Call:
        bare = compiled.create_infer_request()

        def call(x: Any) -> Any:
            bare.set_input_tensor(x)
            bare.infer()
            return bare.get_output_tensor().data

        return call

    return Prepared(
        [request() for _ in range(streams)],
        lambda array: ov.Tensor(array, shared_memory=True),
        numpy.copy,
        {"streams": streams},
    )


def jax_jit(job: Job) -> Prepared:
    """JAX: one jitted forward pass, weights on the device."""
    import jax  # type: ignore[import-not-found, unused-ignore]

    from .jax_models import forward_of, weights_of

    with numpy.load(job.folder / "weights.npz") as state:
        weights = weights_of({name: state[name] for name in state.files})
    forward = jax.jit(forward_of(job.model))
    return Prepared(
        [lambda x: forward(weights, x).block_until_ready()], jax.numpy.asarray, numpy.asarray
    )


def _compiled(job: Job) -> Any:
    import torch

    from ..infer import compile_inference

    model = _torch_model(job)
    samples = None
    if job.max_accuracy_loss is not None:
        samples = tuple(
            torch.from_numpy(numpy.load(job.folder / f"train_{part}.npy")) for part in "xy"
        )
    return compile_inference(
        model, torch.from_numpy(job.x[0]), job.goal, batch_sizes=[job.batch_size],
        max_accuracy_loss=job.max_accuracy_loss, samples=samples,
    )  # fmt: skip


def _hotloop_prepared(runner: Any) -> Prepared:
    """A runner takes tensors and arrays; it is given what its engine computes with."""
    engine = runner.engine
    told = {
        "engine": engine.name, "precision": engine.precision, "threads": engine.num_threads,
        "streams": engine.num_instances,
    }  # fmt: skip

    def convert(array: numpy.ndarray) -> Any:
        if engine.name in ("onnxruntime", "openvino"):
            return array
        import torch

        return torch.from_numpy(array)

    return Prepared([runner] * engine.num_instances, convert, numpy.asarray, told)


def hotloop(job: Job) -> Prepared:
    """``hotloop.compile_inference``."""
    return _hotloop_prepared(_compiled(job))


def hotloop_export(job: Job) -> Prepared:
    """The same, saved by another process and loaded here."""
    from ..infer import load_inference

    return _hotloop_prepared(load_inference(job.folder / "export"))


def build_hotloop(job: Job) -> None:
    """The race inside hotloop, in a process before: it remembers the winner, and is exported."""
    with _compiled(job) as runner:
        runner.save(job.folder / "export")


# Name -> what it does, the libraries it needs, and the extra that brings them.
PEERS: dict[str, tuple[Callable[[Job], Prepared], tuple[str, ...], str]] = {
    "hotloop": (hotloop, (), ""),
    "hotloop-export": (hotloop_export, (), ""),
    "pytorch": (pytorch, (), ""),
    "torchscript": (torchscript, (), ""),
    "inductor": (inductor, (), ""),
    "onnxruntime": (onnxruntime, ("onnxruntime", "onnx", "onnxscript"), "onnx"),
    "openvino": (openvino, ("openvino", "onnx", "onnxscript"), "onnx,openvino"),
    "jax-jit": (jax_jit, ("jax",), "peers"),
}
