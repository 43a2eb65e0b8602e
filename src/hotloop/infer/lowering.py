"""A captured graph to a ``Network``, layer by layer.

Passes of ``graph/`` say which layers there are and what each does in one pass. Here each becomes a
layer of the network, and values are followed to where they lie: images get their channels adjacent,
a flattened image's order goes into the weight that reads it, and what only looks at a value in
another way (views, permutations, parts) costs nothing: attention reads its heads where they lie.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import fx

from ..errors import ModelError
from ..graph import layers
from ..graph.from_export import Constants, layers_of
from ..graph.nodes import arguments
from .network import Network
from .views import View

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Value:
    """A value of the network; ``last``: an image as ``(H, W, C)``, else in PyTorch's own order.

    ``flattened``: the image ``(H, W, C)`` whose flattened form it stands for, not yet in order.
    """

    number: int
    last: bool = False
    flattened: bool = False


def lower(program: torch.export.ExportedProgram) -> Network:
    """The network of a graph for any batch size.

    Args:
        program: ``torch.export`` of a model in eval mode, one float32 input and output.

    Raises:
        ModelError: the graph holds what no layer does; names the first.
    """
    signature = program.graph_signature
    if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
        raise _refused("models of one input and one output", "more")
    return _Lowering(*layers_of(program)).network


class _Lowering:
    def __init__(self, graph: fx.Graph, constants: Constants) -> None:
        self._constants = constants
        self._values: dict[Any, _Value | View] = {}
        self._lists: dict[Any, list[View]] = {}
        nodes: list[Any] = list(graph.nodes)
        for node in nodes:
            if node.op == "placeholder" and node not in constants:
                self.network = Network(_sample(node))
                self._batch = node.meta["val"].shape[0].node.hint
                self._values[node] = _Value(0)
            elif node.op == "call_function":
                self._lower(node)
            elif node.op == "output":
                self._finish(node.args[0][0])

    def _finish(self, result: Any) -> None:
        network = self.network
        number = self._plain(result)
        if number == 0 or number != len(network.shapes) - 1:
            number = network.pointwise(number)
        shape = _sample(result)
        if network.shapes[number] != shape:
            network.as_shape(number, shape)

    # What a node's value is -----------------------------------------------------------------

    def _value(self, node: Any) -> _Value | View:
        if node not in self._values:
            raise _refused("layers on the input", getattr(node, "name", node))
        return self._values[node]

    def _plain(self, node: Any) -> int:
        """The value in PyTorch's own order."""
        value, shape = self._value(node), _sample(node)
        if isinstance(value, View):
            whole = math.prod(shape) == math.prod(self.network.shapes[value.number])
            if not value.is_dense or not whole or len(shape) > 3:
                raise _refused("values whose elements lie side by side", node.name)
            value = _Value(value.number)
        elif value.last or value.flattened:
            value = _Value(self.network.nhwc_to_nchw(value.number))
        if self.network.shapes[value.number] != shape:
            value = _Value(self.network.as_shape(value.number, shape))
        self._values[node] = value
        return value.number

    def _view(self, node: Any) -> View:
        value = self._value(node)
        if isinstance(value, View):
            return value
        return View.dense(self._plain(node), _sample(node))

    def _image(self, node: Any) -> int:
        """The value with channels adjacent."""
        value = self._value(node)
        if value.last:
            return value.number
        number, shape = self._plain(node), _sample(node)
        if len(shape) != 3:
            raise _refused("images of 3 sizes", list(shape))
        c, h, w = shape
        if c == 1 or h * w == 1:
            number = self.network.as_shape(number, (h, w, c))
        else:
            number = self.network.nchw_to_nhwc(number)
        self._values[node] = _Value(number, last=True)
        return number

    def _constant(self, node: Any) -> torch.Tensor:
        if node not in self._constants:
            raise _refused("weights that are constants", node.name)
        return self._constants[node]

    def _keep(self, tensor: torch.Tensor, name: str) -> str:
        if tensor.dtype != torch.float32:
            raise _refused("weights in float32", tensor.dtype)
        name = f"{len(self.network.arrays)}.{name}"
        self.network.arrays[name] = numpy.ascontiguousarray(tensor.numpy())
        return name

    def _kept(self, node: Any, name: str) -> str | None:
        return None if node is None else self._keep(self._constant(node), name)

    # Layers ---------------------------------------------------------------------------------

    def _lower(self, node: Any) -> None:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return  # A size; shapes tell it.
        rule = _RULES.get(node.target)
        if rule is None:
            raise _refused(_LIMITS.get(node.target, "operators it has kernels for"), node.target)
        if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
            raise _refused("float32 values", f"{node.name}: {value.dtype}")
        aten = hasattr(node.target, "_schema")
        rule(self, node, *(arguments(node).values() if aten else node.args))

    def _linear(self, node: Any, x: Any, w: Any, b: Any, addend: Any, activation: str) -> None:
        weight, value, rows = self._constant(w), self._value(x), None
        if weight.dim() != 2:
            raise _refused("weights of two sizes for linear layers", list(weight.shape))
        outputs, depth = weight.shape
        if isinstance(value, View) and not value.is_dense:
            # The same rows in whatever order they stand, as ``nn.MultiheadAttention`` has them.
            whole = value.elements == math.prod(self.network.shapes[value.number])
            if addend is not None or not whole or not value.rows(depth):
                raise _refused("values whose elements lie side by side", node.name)
            rows = value
            number = self.network.as_shape(value.number, (value.elements // depth, depth))
        elif value.flattened:
            # The image lies with channels adjacent: so does each row of the weight then.
            h, width, c = self.network.shapes[value.number]
            weight = weight.reshape(-1, c, h, width).permute(0, 2, 3, 1).reshape(outputs, -1)
            number = self.network.as_shape(value.number, (depth,))
        else:
            number = self._plain(x)
            if len(_sample(x)) == 3:
                raise _refused("rows for linear layers", _sample(x))
        other = None if addend is None else self._plain(addend)
        made = self.network.linear(
            number, self._keep(weight, "weight"), self._kept(b, "bias"), other, activation
        )
        self._values[node] = _Value(made) if rows is None else rows.with_rows(made, depth, outputs)

    def _convolution(
        self, node: Any, x: Any, w: Any, b: Any, addend: Any, *windows_and_rest: Any
    ) -> None:
        number = self._image(x)
        other = None if addend is None else self._image(addend)
        filters = self._keep(self._constant(w).permute(0, 2, 3, 1), "weight")
        made = self.network.convolution(
            number, filters, self._kept(b, "bias"), other, *windows_and_rest
        )
        self._values[node] = _Value(made, last=True)

    def _max_pool(self, node: Any, x: Any, *windows_and_activation: Any) -> None:
        made = self.network.max_pool(self._image(x), *windows_and_activation)
        self._values[node] = _Value(made, last=True)

    def _mean(self, node: Any, x: Any, dims: Any, *_: Any) -> None:
        shape = _sample(x)
        over = sorted(d % (len(shape) + 1) for d in dims or ())
        if len(shape) == 3 and over == [2, 3]:
            number = self._image(x)
        elif len(shape) == 2 and over == [1]:  # Of rows: an image one pixel wide.
            number = self.network.as_shape(self._plain(x), (shape[0], 1, shape[1]))
        else:
            raise _refused("means over whole images or rows", dims)
        self._values[node] = _Value(self.network.mean(number))

    def _adaptive(self, node: Any, x: Any, size: Sequence[int]) -> None:
        if list(size) != [1, 1]:
            raise _refused("adaptive pooling to one pixel", list(size))
        self._mean(node, x, [2, 3])

    def _pointwise(self, node: Any, x: Any, addend: Any, activation: str) -> None:
        image = any(self._value(n).last for n in (x, addend) if n is not None)
        number = self._image if image else self._plain
        value = number(x)
        other = None if addend is None else number(addend)
        made = self.network.pointwise(value, other, activation)
        self._values[node] = _Value(made, last=image)

    def _norm(self, node: Any, x: Any, shape: Any, w: Any, b: Any, eps: float, _: Any) -> None:
        if len(shape) != 1 or len(_sample(x)) > 2:
            raise _refused("layer norm of rows", list(shape))
        weight, bias = (self._kept(n, "norm") for n in (w, b))
        self._values[node] = _Value(self.network.layer_norm(self._plain(x), weight, bias, eps))

    def _attention(
        self, node: Any, q: Any, k: Any, v: Any, mask: Any, dropout: float, causal: bool,
        scale: float | None, enable_gqa: bool,
    ) -> None:  # fmt: skip
        where = [view for n in (q, k, v) if (view := self._view(n).heads()) is not None]
        if mask is not None or dropout or enable_gqa or len(where) < 3:
            raise _refused(
                "attention over [batch, heads, rows, elements] without a mask", node.name
            )
        (heads, queries, size), (_, keys, made) = _sample(q), _sample(v)
        if len({_sample(n)[0] for n in (q, k, v)}) > 1:
            raise _refused("as many heads of queries, keys and values", node.name)
        number = self.network.attention(
            where, heads, (queries, keys), (size, made), scale or size**-0.5, causal
        )
        # Results lie [query][head][element], as what follows wants them.
        self._values[node] = View.dense(number, (queries, heads, made)).permuted([0, 2, 1, 3])

    def _permute(self, node: Any, x: Any, order: Sequence[int]) -> None:
        view = self._view(x)
        self._values[node] = view.permuted([d % len(view.dims) for d in order])

    def _transpose(self, node: Any, x: Any, a: int, b: int) -> None:
        order = list(range(x.meta["val"].dim()))
        order[a], order[b] = order[b], order[a]
        self._permute(node, x, order)

    def _part(self, x: Any, dim: int, start: int, count: int | None) -> View:
        """``count`` from ``start`` on along a dimension; ``None``: one, and the dimension goes."""
        view = self._view(x)
        part = view.part(dim % len(view.dims), start, count)
        if part is None:
            raise _refused("parts of a sample along one dimension", getattr(x, "name", x))
        return part

    def _select(self, node: Any, x: Any, dim: int, index: int) -> None:
        self._values[node] = self._part(x, dim, index, None)

    def _unbind(self, node: Any, x: Any, dim: int) -> None:
        count = len(node.meta["val"])
        self._lists[node] = [self._part(x, dim, place, None) for place in range(count)]

    def _split(self, node: Any, x: Any, _: Any, dim: int) -> None:
        sizes = [int(value.shape[dim]) for value in node.meta["val"]]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        self._lists[node] = [
            self._part(x, dim, start, size) for start, size in zip(starts, sizes, strict=True)
        ]

    def _getitem(self, node: Any, x: Any, index: int) -> None:
        self._values[node] = self._lists[x][index]

    def _softmax(self, node: Any, x: Any, dim: int, _: Any) -> None:
        sizes = len(_sample(x)) + 1
        if sizes > 3 or dim % sizes != sizes - 1:
            raise _refused("softmax over the last dimension of rows", dim)
        logarithm = node.target is _aten.log_softmax.int
        self._values[node] = _Value(self.network.softmax(self._plain(x), logarithm))

    def _reshape(self, node: Any, x: Any, *_: Any) -> None:
        value = self._value(x)
        if value.last:
            h, w, c = self.network.shapes[value.number]
            if h * w == 1 or c == 1:
                number = self.network.as_shape(value.number, _sample(x))
                self._values[x] = _Value(number)
            elif len(_sample(node)) == 1 and _same_batch(node, x):
                self._values[node] = _Value(value.number, flattened=True)
                return
        view = self._view(x).reshaped([self._wanted(size) for size in node.meta["val"].shape])
        if view is None:
            raise _refused("reshapes that copy nothing", node.name)
        self._values[node] = view

    def _wanted(self, size: Any) -> tuple[bool, int]:
        """Whether the batch is in a size, and how many elements of each sample."""
        if isinstance(size, int):
            return False, size
        return True, size.node.hint // self._batch


def _sample(node: Any) -> tuple[int, ...]:
    """Shape of one sample of a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dim():
        raise _refused("tensors with a batch", getattr(node, "name", node))
    sizes = tuple(value.shape[1:])
    if not all(isinstance(size, int) for size in sizes):
        raise _refused("samples of one size", [str(size) for size in value.shape])
    return sizes


def _same_batch(node: Any, x: Any) -> bool:
    return str(node.meta["val"].shape[0]) == str(x.meta["val"].shape[0])


def _refused(rule: str, got: Any) -> ModelError:
    """Why a graph cannot be a network."""
    return ModelError(f"hotloop's own engine takes {rule}", got=got)


# What is asked of operators that a pass makes layers of, where it could not.
_LIMITS: dict[Any, str] = {
    _aten.conv2d.default: "convolutions without groups and dilation",
    _aten.max_pool2d.default: "pooling without dilation and ceil_mode",
    _aten.batch_norm.default: "batch norm with its statistics behind a layer",
    _aten.add.Tensor: "sums of two values of one shape",
    _aten.dropout.default: "a model in eval mode",
}
_RULES: dict[Any, Callable[..., None]] = {
    layers.linear: _Lowering._linear,
    layers.convolution: _Lowering._convolution,
    layers.max_pool: _Lowering._max_pool,
    layers.pointwise: _Lowering._pointwise,
    _aten.mean.dim: _Lowering._mean,
    _aten.adaptive_avg_pool2d.default: _Lowering._adaptive,
    _aten.softmax.int: _Lowering._softmax,
    _aten.log_softmax.int: _Lowering._softmax,
    _aten.layer_norm.default: _Lowering._norm,
    _aten.scaled_dot_product_attention.default: _Lowering._attention,
    _aten.permute.default: _Lowering._permute,
    _aten.transpose.int: _Lowering._transpose,
    _aten.select.int: _Lowering._select,
    _aten.unbind.int: _Lowering._unbind,
    _aten.split.Tensor: _Lowering._split,
    _aten.chunk.default: _Lowering._split,
    operator.getitem: _Lowering._getitem,
    **dict.fromkeys(
        (_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default,
         _aten.unflatten.int, _aten.squeeze.dims, _aten.squeeze.dim, _aten.unsqueeze.default),
        _Lowering._reshape,
    ),
}  # fmt: skip
