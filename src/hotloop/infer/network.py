"""``Network``: a forward pass as a list of layers, for ``kernels/cpp/layers.h``. Imports no torch.

A network takes one float32 tensor ``[batch, ...]`` and gives one. What it is made of is checked as
it is put together, by the same methods when ``lowering`` reads a model and when a file is read, so
that a damaged file is refused and never run.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, SealedError
from ..graph.memory_plan import Lifetime, plan_offsets
from ..graph.windows import is_3x3
from ..sealed import Sealed

if TYPE_CHECKING:
    import numpy

FORMAT = "hotloop network"
FORMAT_VERSION = 1
# In the order of ``LayerKind`` in layers.h.
KINDS = (
    "nchw_to_nhwc", "nhwc_to_nchw", "linear", "convolution", "max_pool", "mean", "pointwise",
    "softmax", "layer_norm", "attention",
)  # fmt: skip
# Names in files of earlier versions.
_FORMER_KINDS = {"turn_in": "nchw_to_nhwc", "turn_out": "nhwc_to_nchw"}
# What may follow a layer, in the order of ``Activation`` in epilogue.h.
ACTIVATIONS = ("none", "relu", "gelu", "tanh_gelu")
_FLOAT_BYTES = 4
_LARGEST = 2**40  # Floats.


# Part of a value: its number, where it begins, how far heads and rows are apart (in floats).
View = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layer:
    """One step of a network.

    Attributes:
        kind: of ``KINDS``.
        out: number of the value it makes.
        value, other: numbers of what it reads; ``other`` is added; ``None``: nothing.
        weight, bias: names of arrays.
        shape: of ``value``: height, width and channels, or rows and elements of each.
        made: the same of the result; where a convolution pools, before that.
        kernel, stride, padding: of windows, along height and width.
        act: what follows, of ``ACTIVATIONS``. pooled: max pooling of 2 by 2 after it.
        logarithm: of softmax. number: of layer norm, its epsilon; of attention, its scale.
        views: of attention: where queries, keys and values lie. causal: whether a query sees no
            later key.
    """

    kind: str
    out: int
    value: int
    shape: tuple[int, ...]
    made: tuple[int, ...]
    other: int | None = None
    weight: str | None = None
    bias: str | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    act: str = "none"
    pooled: bool = False
    logarithm: bool = False
    number: float = 0.0
    views: tuple[View, ...] = ()
    causal: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the values it reads."""
        beside = () if self.other is None else (self.other,)
        return (self.value, *beside, *(view[0] for view in self.views))

    @property
    def is_small_filter(self) -> bool:
        """Whether it is a convolution that 3x3 filters with stride 1 have a kernel for."""
        windows = self.kernel, self.stride, self.padding
        return self.kind == "convolution" and is_3x3(*windows)


class Network:
    """Layers in order; value 0 is the input, the last layer's result the output.

    Args:
        shape: of one sample of the input, as PyTorch has it: ``[C, H, W]`` for an image.

    Attributes:
        shapes: of one sample of each value: ``(H, W, C)`` for images, ``(rows, elements)`` or
            ``(elements,)``.
        layers, arrays: what it computes; its weights, float32.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        _need(1 <= len(shape) <= 3 and all(n > 0 for n in shape), "a shape of 1 to 3 sizes", shape)
        _need(math.prod(shape) < _LARGEST, "a sample below 2**40 elements", shape)
        self.input_shape = tuple(shape)
        self.shapes: list[tuple[int, ...]] = [self.input_shape]
        self.layers: list[Layer] = []
        self.arrays: dict[str, numpy.ndarray] = {}
        self._calls: list[dict[str, Any]] = []
        self._alias: dict[int, int] = {}  # Value -> the one whose memory it is.

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample, as PyTorch has it."""
        return self.shapes[-1]

    def nchw_to_nhwc(self, value: int) -> int:
        """``[C, H, W]`` to ``[H, W, C]``."""
        c, h, w = self._shape(value, 3)
        return self._add("nchw_to_nhwc", value, (h, w, c), (h, w, c))

    def nhwc_to_nchw(self, value: int) -> int:
        """``[H, W, C]`` to ``[C, H, W]``."""
        h, w, c = self._shape(value, 3)
        return self._add("nhwc_to_nchw", value, (h, w, c), (c, h, w))

    def as_shape(self, value: int, shape: tuple[int, ...]) -> int:
        """The same elements in the same order, said to have another shape; costs nothing."""
        before = self._shape(value)
        _need(math.prod(before) == math.prod(shape) and 1 <= len(shape) <= 3, "as many", shape)
        _need(all(n > 0 for n in shape), "sizes above 0", shape)
        self._calls.append({"call": "as_shape", "value": value, "shape": list(shape)})
        self.shapes.append(tuple(shape))
        self._alias[len(self.shapes) - 1] = self._alias.get(value, value)
        return len(self.shapes) - 1

    def linear(
        self,
        value: int,
        weight: str,
        bias: str | None = None,
        other: int | None = None,
        act: str = "none",
    ) -> int:
        """``x W^T + bias (+ other)`` of each row; W ``[outputs, elements]``."""
        rows = self._rows(value)
        w = self._array(weight, 2)
        _need(w.shape[1] == rows[-1], "a weight of as many columns", w.shape)
        made = (*self.shapes[value][:-1], w.shape[0])
        self._check_beside(bias, other, made)
        return self._add(
            "linear", value, rows, made,
            other=other, weight=weight, bias=bias, act=act,
        )  # fmt: skip

    def convolution(
        self,
        value: int,
        weight: str,
        bias: str | None = None,
        other: int | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        act: str = "none",
        pooled: bool = False,
    ) -> int:
        """Filters ``[outputs, height, width, channels]`` over an image; ``pooled``: max of 2x2."""
        h, w, c = self._shape(value, 3)
        o, kh, kw, inputs = self._array(weight, 4).shape
        _need(inputs == c, "filters of as many channels", inputs)
        made = (*_windows((h, w), (kh, kw), stride, padding), o)
        layer = Layer("convolution", 0, value, (h, w, c), made, other, weight, bias,
                      (kh, kw), stride, padding, act, pooled)  # fmt: skip
        plain = layer.is_small_filter and other is None and act in ("none", "relu")
        _need(not pooled or plain, "3x3 to be pooled", made)
        _need(not layer.is_small_filter or act in ("none", "relu"), "relu or nothing", act)
        self._check_beside(bias, other, made)
        result = (made[0] // 2, made[1] // 2, o) if pooled else made
        _need(min(result) > 0, "an image", result)
        return self._append(layer, result)

    def max_pool(
        self,
        value: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int] = (0, 0),
        act: str = "none",
    ) -> int:
        """The greatest of each window; what lies outside the image counts as nothing."""
        h, w, c = self._shape(value, 3)
        _need(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)), "padding", padding)
        made = (*_windows((h, w), kernel, stride, padding), c)
        return self._add("max_pool", value, (h, w, c), made, kernel=tuple(kernel),
                         stride=tuple(stride), padding=tuple(padding), act=act)  # fmt: skip

    def mean(self, value: int) -> int:
        """Of each channel over an image."""
        h, w, c = self._shape(value, 3)
        return self._add("mean", value, (h, w, c), (c,))

    def pointwise(self, value: int, other: int | None = None, act: str = "none") -> int:
        """A value, plus another of its shape, then what follows."""
        shape = self._shape(value)
        self._check_beside(None, other, shape)
        flat = (math.prod(shape), 1, 1)
        return self._add("pointwise", value, flat, shape, other=other, act=act)

    def softmax(self, value: int, logarithm: bool = False) -> int:
        """Over the elements of each row."""
        rows = self._rows(value)
        return self._add("softmax", value, rows, self.shapes[value], logarithm=logarithm)

    def layer_norm(
        self, value: int, weight: str | None, bias: str | None, epsilon: float = 1e-5
    ) -> int:
        """Each row less its mean, over its deviation, times weight, plus bias."""
        rows, shape = self._rows(value), self.shapes[value]
        _need(isinstance(epsilon, float) and epsilon >= 0, "an epsilon of at least 0", epsilon)
        for name in (weight, bias):
            self._check_beside(name, None, shape)
        return self._add("layer_norm", value, rows, shape,
                         weight=weight, bias=bias, number=epsilon)  # fmt: skip

    def attention(
        self,
        views: Sequence[View],
        heads: int,
        rows: tuple[int, int],
        elements: tuple[int, int],
        scale: float,
        causal: bool = False,
    ) -> int:
        """``softmax(q k^T scale) v`` of each head; ``(queries, heads * elements of v)``.

        Args:
            views: queries, keys and values. rows: of queries, and of keys and values.
            elements: of a query and a key, and of a value, in each head.
            causal: query i sees keys 0 to i alone.
        """
        (queries, keys), (size, made) = rows, elements
        sizes = (heads, *rows, *elements)
        _need(all(type(n) is int and n > 0 for n in sizes), "sizes above 0", sizes)
        _need(isinstance(scale, float) and 0 < scale < math.inf, "a scale above 0", scale)
        _need(len(views) == 3, "queries, keys and values", len(views))
        reach = ((queries, size), (keys, size), (keys, made))
        for (value, offset, across, along), (count, width) in zip(views, reach, strict=True):
            steps = (offset, across, along)
            _need(all(type(n) is int and n >= 0 for n in steps), "distances of at least 0", steps)
            end = offset + (heads - 1) * across + (count - 1) * along + width
            _need(end <= math.prod(self._shape(value)), "views inside their values", end)
        layer = Layer("attention", 0, views[0][0], (queries, keys, size), (heads, made),
                      number=scale, views=tuple(views), causal=causal)  # fmt: skip
        call = {"views": [list(v) for v in views], "heads": heads, "rows": list(rows),
                "elements": list(elements), "scale": scale, "causal": causal}  # fmt: skip
        return self._append(layer, (queries, heads * made), call)

    def _shape(self, value: int, sizes: int | None = None) -> tuple[int, ...]:
        known = isinstance(value, int) and 0 <= value < len(self.shapes)
        _need(known, "a value made before", value)
        shape = self.shapes[value]
        _need(sizes is None or len(shape) == sizes, f"a value of {sizes} sizes", shape)
        return shape

    def _rows(self, value: int) -> tuple[int, int, int]:
        """A value as rows: how many, 1, and the elements of each."""
        shape = self._shape(value)
        _need(len(shape) <= 2, "rows", shape)
        return (shape[0] if len(shape) == 2 else 1), 1, shape[-1]

    def _array(self, name: str, sizes: int) -> numpy.ndarray:
        array = self.arrays.get(name)
        _need(array is not None, "an array of the file", name)
        assert array is not None
        plain = array.dtype.name == "float32" and array.ndim == sizes and min(array.shape) > 0
        _need(plain, f"a float32 array of {sizes} sizes", f"{array.dtype} {array.shape}")
        return array

    def _check_beside(self, bias: str | None, other: int | None, made: tuple[int, ...]) -> None:
        if bias is not None:
            shape = self._array(bias, 1).shape
            _need(shape == made[-1:], "a bias for each output", shape)
        if other is not None:
            _need(self._shape(other) == made, "a value of the same shape", self._shape(other))

    def _add(
        self, kind: str, value: int, shape: tuple[int, ...], made: tuple[int, ...], **rest: Any
    ) -> int:
        return self._append(Layer(kind, 0, value, shape, made, **rest), made)

    def _append(
        self, layer: Layer, result: tuple[int, ...], call: dict[str, Any] | None = None
    ) -> int:
        _need(layer.act in ACTIVATIONS, "something that may follow", layer.act)
        _need(math.prod(result) < _LARGEST, "a value below 2**40 elements", result)
        self.shapes.append(result)
        self.layers.append(replace(layer, out=len(self.shapes) - 1))
        if call is None:
            known = {**vars(layer), "epsilon": layer.number}
            named = inspect.signature(getattr(self, layer.kind)).parameters
            call = {name: known[name] for name in named}
        self._calls.append({"call": layer.kind} | call)
        return len(self.shapes) - 1

    def offsets(self) -> tuple[list[int], int]:
        """Where each value lies in the arena, and the arena's size: floats for one sample.

        -1 and -2 stand for the memory of the input and of the result.
        """
        source = [self._alias.get(v, v) for v in range(len(self.shapes))]
        last = {source[v]: n for n, layer in enumerate(self.layers) for v in layer.reads}
        offset = {0: -1, source[-1]: -2}
        made = {layer.out: n for n, layer in enumerate(self.layers) if layer.out not in offset}
        lifetimes = [
            Lifetime(_FLOAT_BYTES * math.prod(self.shapes[value]), first, last.get(value, first))
            for value, first in made.items()
        ]
        found, total_bytes = plan_offsets(lifetimes)
        offset |= {v: at // _FLOAT_BYTES for v, at in zip(made, found, strict=True)}
        return [offset[v] for v in source], total_bytes // _FLOAT_BYTES

    def save(self, path: Path) -> None:
        """A safetensors file whose header describes the layers; an export is whole as a folder."""
        from safetensors.numpy import save_file

        document = {
            "format": FORMAT, "version": FORMAT_VERSION,
            "shape": list(self.input_shape), "layers": self._calls,
        }  # fmt: skip
        save_file(self.arrays, path, metadata={"hotloop": json.dumps(document)})

    @classmethod
    def load(cls, path: Path | Sealed) -> Network:
        """What ``save`` wrote, every layer checked.

        Raises:
            ModelError: not such a file.
        """
        try:
            metadata, arrays = _read_sealed(path) if isinstance(path, Sealed) else _read(path)
            document = json.loads(metadata["hotloop"])
            _need(document["format"] == FORMAT, FORMAT, document["format"])
            _need(document["version"] == FORMAT_VERSION, "this version", document["version"])
            network = cls(tuple(map(_size, document["shape"])))
            network.arrays = arrays
            for call in document["layers"]:
                network._replay(dict(call))
            _need(bool(network.layers), "one layer", 0)
        except SealedError:
            raise
        except ModelError as error:
            raise ModelError(f"{path} must be a network of hotloop", got=error) from None
        except Exception as error:  # Whatever a parser raises on a damaged file.
            got = f"{type(error).__name__}: {error}"
            raise ModelError(f"{path} must be a network of hotloop", got=got) from None
        return network

    def _replay(self, call: dict[str, Any]) -> None:
        name = call.pop("call")
        name = _FORMER_KINDS.get(name, name)
        _need(name in (*KINDS, "as_shape"), "a layer of this version", name)
        method: Callable[..., int] = getattr(self, name)
        pairs = ("stride", "padding", "kernel", "shape", "rows", "elements")
        for key in pairs:
            if key in call:
                sizes = tuple(map(_size, call[key]))
                _need(key == "shape" or len(sizes) == 2, "two sizes", sizes)
                call[key] = sizes
        if "views" in call:
            call["views"] = [tuple(view) for view in call["views"]]
        method(**call)


def _size(value: Any) -> int:
    _need(type(value) is int and 0 <= value < _LARGEST, "a size", value)
    return int(value)


def _windows(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of what windows over an image make."""
    _need(min(stride) > 0 and min(kernel) > 0 and min(padding) >= 0, "windows", (kernel, stride))
    h, w = (
        (n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)
    )
    _need(min(h, w) > 0 and all(p < k for p, k in zip(padding, kernel, strict=True)),
          "an image at least as large as the window", (h, w))  # fmt: skip
    return h, w


def _need(holds: bool, rule: str, got: Any) -> None:
    if not holds:
        raise ModelError(f"a layer needs {rule}", got=got)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and arrays of a safetensors file."""
    from safetensors import safe_open
    from safetensors.numpy import load_file

    with safe_open(path, framework="numpy") as file:
        return file.metadata(), load_file(path)


def _read_sealed(path: Sealed) -> tuple[dict[str, str], dict[str, Any]]:
    from safetensors.numpy import load

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"], load(data)
