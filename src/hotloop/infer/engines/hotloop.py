"""hotloop's own engine: a ``Network`` on the kernels of ``kernels/``. Imports no torch."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import kernels
from ...errors import RunError
from ...kernels import binding
from ...kernels.loader import failure
from ...sealed import Sealed
from ..engine import TensorSpec, check_arrays, not_on_cpu
from ..network import ACTIVATIONS, KINDS, Layer, Network

if TYPE_CHECKING:
    import numpy
    import torch

_ABSENT = -3
_LINE_BYTES = 64
# How long a thread without work looks for some before it sleeps.
_SPIN_NS, _SHORT_SPIN_NS = 200_000, 20_000


def library(*, spinning: bool = True) -> ctypes.CDLL:
    """The kernels, with torch's threads where torch is loaded.

    Args:
        spinning: ``False``: threads without work sleep after 20 us instead of 200. For all engines
            of a process, and not for torch's threads.

    Raises:
        RunError: there are none here.
    """
    loaded = kernels.library()
    loaded.hotloop_set_spin(_SPIN_NS if spinning else _SHORT_SPIN_NS)
    if "torch" in sys.modules:
        kernels.use_torch()
    return loaded


def kernels_key() -> str:
    """Other kernels, another race."""
    return f"{binding.binding_hash()}-{kernels.build_hash()}"


class HotloopEngine:
    """A network whose weights are packed for this machine, once for all instances.

    Args:
        network: what to run, or the file of one.
        inputs, outputs: names and shapes, one each.
        num_threads: inside one call. num_instances: see ``Engine``. spinning: see ``library``.

    Raises:
        ModelError: the file is no network.
        RunError: there are no kernels here.
    """

    name = "hotloop"
    precision = "float32"

    def __init__(
        self,
        network: Network | str | Path | Sealed,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        num_threads: int = 1,
        num_instances: int = 1,
        spinning: bool = True,
    ) -> None:
        import numpy

        self._library = library(spinning=spinning)
        self._run: Callable[..., int] = self._library.hotloop_network_run
        if not isinstance(network, Network):
            network = Network.load(network if isinstance(network, Sealed) else Path(network))
        self.num_threads = num_threads
        self.num_instances = num_instances
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._result = network.output_shape
        offsets, self._arena_floats = network.offsets()
        self._kept: list[numpy.ndarray] = []  # Alive: the layers hold addresses.
        rows = [self._laid_out(network, layer, offsets) for layer in network.layers]
        self._layers = (binding.Layer * len(rows))(*rows)
        self._network = binding.Network(
            ctypes.addressof(self._layers), len(rows), self._arena_floats, num_threads
        )
        self._at = ctypes.addressof(self._network)
        self._empty = numpy.empty
        self._contiguous = numpy.ascontiguousarray
        self._float32 = numpy.dtype("float32")
        self._tensor_of: Callable[..., Any] | None = None
        self.weight_bytes = sum(array.nbytes for array in self._kept)

    def _laid_out(self, network: Network, layer: Layer, offsets: list[int]) -> Any:
        h, w, c = layer.shape
        made = layer.made if len(layer.made) == 3 else (1, 1, layer.made[-1])
        row = binding.Layer(
            kind=KINDS.index(layer.kind), input=offsets[layer.value], output=offsets[layer.out],
            addend=_ABSENT if layer.other is None else offsets[layer.other],
            windows=binding.Windows(
                0, c, h, w, *made[:2], *layer.kernel, *layer.stride, *layer.padding
            ),
            output_channels=made[2], activation=ACTIVATIONS.index(layer.act),
            max_pool_2x2=bool(layer.pooled), logarithm=bool(layer.logarithm),
        )  # fmt: skip
        if layer.kind == "attention":
            row.attention = _attention(network, layer, offsets)
        if layer.bias is not None:
            row.bias = self._keep(network.arrays[layer.bias])
        if layer.kind == "layer_norm":
            row.epsilon = layer.number
            if layer.weight is not None:
                row.weight = self._keep(network.arrays[layer.weight])
        elif layer.weight is not None:
            self._pack(row, layer, network.arrays[layer.weight])
        return row

    def _pack(self, row: Any, layer: Layer, weight: numpy.ndarray) -> None:
        """The weight as its kernel reads it: panels, prepared filters, or both."""
        outputs, depth = len(weight), weight[0].size
        own, at, channels = self._library, weight.ctypes.data, layer.shape[2]
        row.panel_cols = own.hotloop_panel_cols(outputs, self.num_threads)
        panels = True
        if layer.is_small_filter:
            size = own.hotloop_prepared_filter_floats(outputs, channels)
            row.filters = self._keep(self._block(size))
            own.hotloop_prepare_filters(at, outputs, channels, row.filters)
            panels = not layer.pooled and bool(
                own.hotloop_needs_panels(channels, *layer.made[:2], self.num_threads)
            )
        if panels:
            size = own.hotloop_packed_floats(outputs, depth, row.panel_cols)
            row.weight = self._keep(self._block(size))
            own.hotloop_pack_panels(at, outputs, depth, row.panel_cols, row.weight)

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
        return int(self._library.hotloop_network_values_bytes(self._arena_floats, batch_size))

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
        if self._run(self._at, batch, _address(array), _address(result)):
            raise failure(self._library)
        return result

    def run_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``run`` for tensors that the caller has checked: 2 us less than by way of arrays."""
        (x,) = tensors
        if self._tensor_of is None:
            import torch

            self._tensor_of = torch.empty
        if not x.is_cpu:
            raise not_on_cpu(x.device)
        if not x.is_contiguous():
            x = x.contiguous()
        batch = x.shape[0]
        result = self._tensor_of((batch, *self._result))
        if self._run(self._at, batch, x.data_ptr(), result.data_ptr()):
            raise failure(self._library)
        return [result]

    def close(self) -> None:
        """See ``Engine.close``."""
        del self._layers
        self._kept.clear()
        self._run = _closed


def _attention(network: Network, layer: Layer, offsets: list[int]) -> Any:
    queries, keys, head_size = layer.shape
    heads, value_size = layer.made
    operands = (binding.AttentionOperand * 3)(
        *(
            binding.AttentionOperand(offsets[value], *steps, math.prod(network.shapes[value]))
            for value, *steps in layer.views
        )
    )
    return binding.Attention(
        operands, heads, queries, keys, head_size, value_size, bool(layer.causal), layer.number
    )


def _address(array: numpy.ndarray) -> int:
    """Where an array lies; ``array.ctypes.data`` takes three times as long."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # Read-only, or empty.
        return int(array.ctypes.data)


def _closed(*_: Any) -> int:
    raise RunError("the engine must be open", next_step="load the model again")
