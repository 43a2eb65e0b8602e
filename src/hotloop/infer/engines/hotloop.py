"""hotloop's own engine: a ``Network`` on the kernels of the compiled step. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError, RunError
from ...machine import Machine, native
from ..engine import TensorSpec, check_arrays
from ..network import ACTS, KINDS, Layer, Network

if TYPE_CHECKING:
    import numpy
    import torch

_KERNELS = Path(__file__).parents[1] / "kernels"
_OF_THE_STEP = Path(__file__).parents[2] / "step" / "kernels"
_PARTS = ("gemm.h", "gemm.cpp", "winograd.cpp", "convolution.cpp")
_ABSENT = -3
_LINE_BYTES = 64
# GNU's OpenMP looks so often for work before a thread sleeps.
_SPIN_COUNT, _SHORT_SPIN = "GOMP_SPINCOUNT", "1000"


class _Layer(ctypes.Structure):
    """``hotloop_layer`` of ``kernels/network.cpp``."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "kind", "input", "other", "out", "C", "H", "W", "O", "OH", "OW", "kh", "kw", "sh",
                "sw", "ph", "pw", "act", "pooled", "logarithm", "width",
            )
        ),
        ("sources", ctypes.c_int64 * 3),
        ("offset", ctypes.c_int64 * 3),
        ("heads_apart", ctypes.c_int64 * 3),
        ("rows_apart", ctypes.c_int64 * 3),
        ("causal", ctypes.c_int64),
        ("number", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("packed", "filter", "bias")),
    )  # fmt: skip


def library(*, spinning: bool = True) -> ctypes.CDLL:
    """The kernels, built for this machine at the first use (3 s), then from the cache.

    Args:
        spinning: ``False``: threads without work sleep after some 20 us, not after milliseconds.
            OpenMP asks once, as it is loaded: the first engine of a process decides, unless the
            environment does.

    Raises:
        RunError: no C++ compiler, or it refused.
    """
    said = any(name in os.environ for name in ("OMP_WAIT_POLICY", _SPIN_COUNT))
    if spinning or said:
        return _loaded()
    os.environ[_SPIN_COUNT] = _SHORT_SPIN
    try:
        return _loaded()
    finally:
        del os.environ[_SPIN_COUNT]


@functools.cache
def _loaded() -> ctypes.CDLL:
    kernels = native.load(
        _KERNELS / "network.cpp",
        parts=tuple(_OF_THE_STEP / name for name in _PARTS),
        flags=(
            "-march=native",
            "-fopenmp",
            "-fno-math-errno",
            "-mprefer-vector-width=512",
            f"-DHOTLOOP_MACHINE={Machine.probe().fingerprint()}",
        ),
        needs_torch=False,
    )
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    kernels.hotloop_network_width.argtypes = [integer] * 2
    kernels.hotloop_network_packed.argtypes = [integer] * 3
    kernels.hotloop_network_filtered.argtypes = [integer] * 2
    kernels.hotloop_network_pack.argtypes = [pointer, *[integer] * 3, pointer]
    kernels.hotloop_network_filter.argtypes = [pointer, *[integer] * 2, pointer]
    kernels.hotloop_network_needs_patches.argtypes = [integer] * 4
    kernels.hotloop_network_values_bytes.argtypes = [integer] * 2
    for name in (
        "width", "packed", "filtered", "scratch_bytes", "needs_patches", "values_bytes",
    ):  # fmt: skip
        getattr(kernels, f"hotloop_network_{name}").restype = integer
    kernels.hotloop_network_run.restype = None
    kernels.hotloop_network_run.argtypes = [
        pointer, integer, integer, integer, pointer, pointer, ctypes.c_int32,
    ]  # fmt: skip
    return kernels


def kernels_key() -> str:
    """Other kernels, another race."""
    sources = (_KERNELS / "network.cpp", *(_OF_THE_STEP / name for name in _PARTS))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class HotloopEngine:
    """A network whose weights are packed for this machine, once for all instances.

    Args:
        network: what to run, or the file of one.
        inputs, outputs: names and shapes, one each.
        num_threads: inside one call. num_instances: see ``Engine``. spinning: see ``library``.

    Raises:
        ModelError: the file is no network.
        RunError: the kernels cannot be built here.
    """

    name = "hotloop"
    precision = "float32"

    def __init__(
        self,
        network: Network | str | Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        num_threads: int = 1,
        num_instances: int = 1,
        spinning: bool = True,
    ) -> None:
        import numpy

        self._library = library(spinning=spinning)
        self._run: Callable[..., None] = self._library.hotloop_network_run
        if not isinstance(network, Network):
            network = Network.load(Path(network))
        self.num_threads = num_threads
        self.num_instances = num_instances
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._result = network.output_shape
        places, self._floats = network.places()
        self._kept: list[numpy.ndarray] = []  # Alive: the layers hold addresses.
        rows = [self._laid_out(network, layer, places) for layer in network.layers]
        self._layers = (_Layer * len(rows))(*rows)
        self._table = ctypes.addressof(self._layers)
        self._count = len(rows)
        self._empty = numpy.empty
        self._contiguous = numpy.ascontiguousarray
        self._float32 = numpy.dtype("float32")
        self._tensor_of: Callable[..., Any] | None = None
        self.weight_bytes = sum(array.nbytes for array in self._kept)

    def _laid_out(self, network: Network, layer: Layer, places: list[int]) -> _Layer:
        h, w, c = layer.shape
        made = layer.made if len(layer.made) == 3 else (1, 1, layer.made[-1])
        row = _Layer(
            kind=KINDS.index(layer.kind), input=places[layer.value], out=places[layer.out],
            other=_ABSENT if layer.other is None else places[layer.other],
            C=c, H=h, W=w, OH=made[0], OW=made[1], O=made[2],
            kh=layer.kernel[0], kw=layer.kernel[1], sh=layer.stride[0], sw=layer.stride[1],
            ph=layer.padding[0], pw=layer.padding[1],
            act=ACTS.index(layer.act), pooled=bool(layer.pooled),
            logarithm=bool(layer.logarithm), causal=bool(layer.causal), number=layer.number,
        )  # fmt: skip
        if layer.kind == "attention":
            values, *steps = zip(*layer.views, strict=True)
            row.sources[:] = [places[value] for value in values]
            row.offset[:], row.heads_apart[:], row.rows_apart[:] = steps
            row.O, row.OW = layer.made
            row.kh, row.kw, row.sh = (math.prod(network.shapes[value]) for value in values)
        if layer.bias is not None:
            row.bias = self._keep(network.arrays[layer.bias])
        if layer.kind == "layer_norm" and layer.weight is not None:
            row.packed = self._keep(network.arrays[layer.weight])
        if layer.weight is None or layer.kind == "layer_norm":
            return row
        weight = network.arrays[layer.weight]
        outputs, depth = len(weight), weight[0].size
        kernels, at = self._library, weight.ctypes.data
        row.width = kernels.hotloop_network_width(outputs, self.num_threads)
        patches = True
        if layer.is_small_filter:
            size = kernels.hotloop_network_filtered(outputs, c)
            row.filter = self._keep(self._block(size))
            kernels.hotloop_network_filter(at, outputs, c, row.filter)
            patches = not layer.pooled and bool(
                kernels.hotloop_network_needs_patches(c, made[0], made[1], self.num_threads)
            )
        if patches:
            size = kernels.hotloop_network_packed(outputs, depth, row.width)
            row.packed = self._keep(self._block(size))
            kernels.hotloop_network_pack(at, outputs, depth, row.width, row.packed)
        return row

    def _block(self, floats: int) -> numpy.ndarray:
        """At a whole cache line."""
        import numpy

        block = numpy.empty(floats + _LINE_BYTES // 4, dtype=numpy.float32)
        skip = -block.ctypes.data % _LINE_BYTES // 4
        return block[skip : skip + floats]

    def _keep(self, array: numpy.ndarray) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)

    def working_bytes(self, batch_size: int) -> int:
        """What the values between the layers take in a call; a large batch goes in parts."""
        return int(self._library.hotloop_network_values_bytes(self._floats, batch_size))

    def run(self, arrays: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """See ``Engine.run``. A contiguous array is read where it lies."""
        check_arrays(self.inputs, arrays)
        return [self.run_one(arrays[0])]

    def run_one(self, array: numpy.ndarray) -> numpy.ndarray:
        """``run`` for one array that the caller has checked."""
        if not array.flags.c_contiguous:
            array = self._contiguous(array)
        batch = array.shape[0]
        result = self._empty((batch, *self._result), self._float32)
        self._run(
            self._table, self._count, self._floats, batch,
            _address(array), _address(result), self.num_threads,
        )  # fmt: skip
        return result

    def run_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``run`` for tensors that the caller has checked: 2 us less than by way of arrays."""
        (x,) = tensors
        if self._tensor_of is None:
            import torch

            self._tensor_of = torch.empty
        if not x.is_cpu:
            raise InputError(
                "the model is on the CPU, so must its input be", got=x.device,
                next_step="pass x.cpu()",
            )  # fmt: skip
        if not x.is_contiguous():
            x = x.contiguous()
        batch = x.shape[0]
        result = self._tensor_of((batch, *self._result))
        self._run(
            self._table, self._count, self._floats, batch,
            x.data_ptr(), result.data_ptr(), self.num_threads,
        )  # fmt: skip
        return [result]

    def close(self) -> None:
        """See ``Engine.close``."""
        del self._layers
        self._kept.clear()
        self._run = _closed


def _address(array: numpy.ndarray) -> int:
    """Where an array lies; ``array.ctypes.data`` takes three times as long."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # Read-only, or empty.
        return int(array.ctypes.data)


def _closed(*_: Any) -> None:
    raise RunError("the engine must be open", next_step="load the model again")
