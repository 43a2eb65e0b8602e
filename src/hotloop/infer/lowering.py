"""A captured graph to a ``Network``: which layers hotloop's own kernels run, and what they fuse.

Batch norm goes into the weights of what it follows; bias, a sum with another value, relu or gelu
and 2x2 pooling into the layer whose result they take. Images get their channels adjacent, and a
flattened image's order goes into the weight that reads it. What only looks at a value in another
way (views, permutations, parts) costs nothing: attention reads its heads where they lie.
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

from .following import ACTS, RELUS, Following, act_of, pair, refused
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
    return _Lowering(program).network


class _Lowering:
    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        if len(signature.user_inputs) != 1 or len(signature.user_outputs) != 1:
            raise refused("models of one input and one output", "more")
        self._tensors: dict[str, torch.Tensor] = {}
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        stored = {**program.state_dict, **program.constants}
        for node, target in {**named, **signature.inputs_to_lifted_tensor_constants}.items():
            self._tensors[node] = stored[target].detach()
        self._values: dict[fx.Node, _Value | View] = {}
        self._lists: dict[fx.Node, list[View]] = {}
        self._following = Following(self._constant)
        nodes: list[Any] = list(program.graph.nodes)
        for node in nodes:
            if node.op == "placeholder" and node.name not in self._tensors:
                self.network = Network(_sample(node))
                self._batch = node.meta["val"].shape[0].node.hint
                self._values[node] = _Value(0)
            elif node.op == "call_function" and node not in self._following.taken:
                self._lower(node)
            elif node.op == "output":
                self._finish(node.args[0][0])

    def _finish(self, result: fx.Node) -> None:
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
            raise refused("layers on the input", getattr(node, "name", node))
        return self._values[node]

    def _plain(self, node: Any) -> int:
        """The value in PyTorch's own order."""
        value, shape = self._value(node), _sample(node)
        if isinstance(value, View):
            whole = math.prod(shape) == math.prod(self.network.shapes[value.number])
            if not value.is_dense or not whole or len(shape) > 3:
                raise refused("values whose elements lie side by side", node.name)
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
        number = self._plain(node)
        c, h, w = _sizes(_sample(node), 3)
        if c == 1 or h * w == 1:
            number = self.network.as_shape(number, (h, w, c))
        else:
            number = self.network.nchw_to_nhwc(number)
        self._values[node] = _Value(number, last=True)
        return number

    def _constant(self, node: Any) -> torch.Tensor | None:
        if node is None:
            return None
        if node.name not in self._tensors:
            raise refused("weights that are constants", node.name)
        return self._tensors[node.name]

    def _keep(self, tensor: torch.Tensor | None, name: str) -> str | None:
        if tensor is None:
            return None
        if tensor.dtype != torch.float32:
            raise refused("weights in float32", tensor.dtype)
        name = f"{len(self.network.arrays)}.{name}"
        self.network.arrays[name] = numpy.ascontiguousarray(tensor.numpy())
        return name

    # Layers ---------------------------------------------------------------------------------

    def _lower(self, node: Any) -> None:
        if isinstance(node.meta.get("val"), (torch.SymInt, int)):
            return  # A size; shapes tell it.
        rule = _RULES.get(node.target)
        if rule is None:
            raise refused("operators it has kernels for", node.target)
        _check_float(node)
        rule(self, node, *node.args, **node.kwargs)

    def _same(self, node: Any, x: Any, *_: Any, **__: Any) -> None:
        self._values[node] = self._value(x)

    def _drop(self, node: Any, x: Any, p: float = 0.5, train: bool = False) -> None:
        if train:
            raise refused("a model in eval mode", "dropout in training")
        self._same(node, x)

    def _linear(self, node: Any, x: Any, w: Any, b: Any = None) -> None:
        weight, bias = self._constant(w), self._constant(b)
        assert weight is not None
        value, last = self._value(x), node
        if isinstance(value, View) and not value.is_dense:
            self._linear_of_rows(value, node, weight, bias)
            return
        if value.flattened:
            # The image lies with channels adjacent: so does each row of the weight then.
            h, width, c = self.network.shapes[value.number]
            shaped = weight.reshape(-1, c, h, width).permute(0, 2, 3, 1)
            weight = shaped.reshape(len(weight), -1)
            number = self.network.as_shape(value.number, (h * width * c,))
        else:
            number = self._plain(x)
            if len(_sample(x)) == 3:
                raise refused("rows for linear layers", _sample(x))
        if len(_sample(node)) == 1:  # Of rows, batch norm would take each row for a channel.
            last, weight, bias = self._following.norm(node, weight, bias)
        last, other = self._sum_after(last, image=False)
        last, act = self._following.act(last, ACTS)
        made = self.network.linear(
            number, self._keep(weight, "weight") or "", self._keep(bias, "bias"), other, act
        )
        self._done(node, last, _Value(made))

    def _linear_of_rows(
        self, view: View, node: Any, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        """The same rows in whatever order they stand, as ``nn.MultiheadAttention`` has them."""
        outputs, depth = weight.shape
        whole = view.elements == math.prod(self.network.shapes[view.number])
        if not whole or not view.rows(depth):
            raise refused("values whose elements lie side by side", node.name)
        number = self.network.as_shape(view.number, (view.elements // depth, depth))
        last, act = self._following.act(node, ACTS)
        made = self.network.linear(
            number, self._keep(weight, "weight") or "", self._keep(bias, "bias"), None, act
        )
        self._done(node, last, view.with_rows(made, depth, outputs))

    def _convolution(
        self,
        node: Any,
        x: Any,
        w: Any,
        b: Any = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> None:
        weight, bias = self._constant(w), self._constant(b)
        assert weight is not None
        if groups != 1 or {*dilation} != {1} or weight.dim() != 4 or isinstance(padding, str):
            raise refused("convolutions without groups and dilation", node.name)
        number = self._image(x)
        last, weight, bias = self._following.norm(node, weight, bias)
        last, other = self._sum_after(last, image=True)
        last, act = self._following.act(last, RELUS)
        filters = weight.permute(0, 2, 3, 1)
        pooled = False
        small = filters.shape[1:3] == (3, 3) and {*stride} == {1} and max(padding) <= 2
        if small and other is None and (pool := self._following.pool(last)) is not None:
            last, pooled = pool, True
            if act == "none":
                last, act = self._following.act(last, RELUS)
        made = self.network.convolution(
            number, self._keep(filters, "weight") or "", self._keep(bias, "bias"), other,
            pair(stride), pair(padding), act, pooled,
        )  # fmt: skip
        self._done(node, last, _Value(made, last=True))

    def _max_pool(
        self,
        node: Any,
        x: Any,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> None:
        if {*dilation} != {1} or ceil_mode:
            raise refused("pooling without dilation and ceil_mode", node.name)
        number = self._image(x)
        last, act = self._following.act(node, ACTS)
        made = self.network.max_pool(
            number, pair(kernel), pair(stride or kernel), pair(padding), act
        )
        self._done(node, last, _Value(made, last=True))

    def _mean(self, node: Any, x: Any, dims: Any, keep: bool = False, **_: Any) -> None:
        shape = _sample(x)
        sizes = len(shape) + 1
        over = sorted(d % sizes for d in dims)
        if sizes == 4 and over == [2, 3]:
            number = self._image(x)
        elif sizes == 3 and over == [1]:  # Of rows: an image one pixel wide.
            number = self.network.as_shape(self._plain(x), (shape[0], 1, shape[1]))
        else:
            raise refused("means over whole images or rows", list(dims))
        self._values[node] = _Value(self.network.mean(number))

    def _adaptive(self, node: Any, x: Any, size: Sequence[int]) -> None:
        if list(size) != [1, 1]:
            raise refused("adaptive pooling to one pixel", list(size))
        self._values[node] = _Value(self.network.mean(self._image(x)))

    def _sum(self, node: Any, a: Any, b: Any, alpha: float = 1) -> None:
        both = isinstance(a, fx.Node) and isinstance(b, fx.Node)
        alike = both and _sample(a) == _sample(b) and _same_batch(a, b)
        if not alike or alpha != 1:
            raise refused("sums of two values of one shape", node.name)
        last, act = self._following.act(node, ACTS)
        image = self._value(a).last or self._value(b).last
        place = self._image if image else self._plain
        made = self.network.pointwise(place(a), place(b), act)
        self._done(node, last, _Value(made, last=image))

    def _alone(self, node: Any, x: Any, *_: Any, **__: Any) -> None:
        act = act_of(node)
        if act is None:
            raise refused("relu and gelu", node.name)
        value = self._value(x)
        number = value.number if value.last else self._plain(x)
        self._values[node] = _Value(self.network.pointwise(number, None, act), last=value.last)

    def _norm(
        self,
        node: Any,
        x: Any,
        shape: Any,
        w: Any = None,
        b: Any = None,
        eps: float = 1e-5,
        *_: Any,
    ) -> None:
        if len(shape) != 1 or len(_sample(x)) > 2:
            raise refused("layer norm of rows", list(shape))
        weight, bias = (self._keep(self._constant(n), "norm") for n in (w, b))
        self._values[node] = _Value(self.network.layer_norm(self._plain(x), weight, bias, eps))

    def _attention(
        self,
        node: Any,
        q: Any,
        k: Any,
        v: Any,
        mask: Any = None,
        dropout: float = 0.0,
        causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        where = [view for n in (q, k, v) if (view := self._view(n).heads()) is not None]
        if mask is not None or dropout or enable_gqa or len(where) < 3:
            raise refused("attention over [batch, heads, rows, elements] without a mask", node.name)
        (heads, queries, size), (_, keys, made) = _sample(q), _sample(v)
        if len({_sample(n)[0] for n in (q, k, v)}) > 1:
            raise refused("as many heads of queries, keys and values", node.name)
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
            raise refused("parts of a sample along one dimension", getattr(x, "name", x))
        return part

    def _select(self, node: Any, x: Any, dim: int, index: int) -> None:
        self._values[node] = self._part(x, dim, index, None)

    def _unbind(self, node: Any, x: Any, dim: int = 0) -> None:
        count = len(node.meta["val"])
        self._lists[node] = [self._part(x, dim, place, None) for place in range(count)]

    def _split(self, node: Any, x: Any, _: Any, dim: int = 0) -> None:
        sizes = [int(value.shape[dim]) for value in node.meta["val"]]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        self._lists[node] = [
            self._part(x, dim, start, size) for start, size in zip(starts, sizes, strict=True)
        ]

    def _getitem(self, node: Any, x: Any, index: int) -> None:
        self._values[node] = self._lists[x][index]

    def _softmax(self, node: Any, x: Any, dim: int, *_: Any, **__: Any) -> None:
        sizes = len(_sample(x)) + 1
        if sizes > 3 or dim % sizes != sizes - 1:
            raise refused("softmax over the last dimension of rows", dim)
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
            raise refused("reshapes that copy nothing", node.name)
        self._values[node] = view

    def _wanted(self, size: Any) -> tuple[bool, int]:
        """Whether the batch is in a size, and how many elements of each sample."""
        if isinstance(size, int):
            return False, size
        return True, size.node.hint // self._batch

    def _done(self, node: Any, last: Any, value: _Value | View) -> None:
        self._values[node] = value
        self._values[last] = value

    def _sum_after(self, node: Any, image: bool) -> tuple[Any, int | None]:
        """A sum with a value made before, which the layer then adds itself."""
        user = self._following.next(node)
        if user is None or user.target not in _SUMS or user.kwargs or len(user.args) != 2:
            return node, None
        other = user.args[1] if user.args[0] is node else user.args[0]
        if other is node or not isinstance(other, fx.Node) or other not in self._values:
            return node, None
        value = self._value(other)
        alike = _sample(other) == _sample(node) and _same_batch(other, node)
        if not alike or value.flattened or isinstance(value, View):
            return node, None
        number = self._image(other) if image else self._plain(other)
        return self._following.take(user), number


def _sample(node: Any) -> tuple[int, ...]:
    """Shape of one sample of a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dim():
        raise refused("tensors with a batch", getattr(node, "name", node))
    sizes = tuple(value.shape[1:])
    if not all(isinstance(size, int) for size in sizes):
        raise refused("samples of one size", [str(size) for size in value.shape])
    return sizes


def _same_batch(node: Any, x: Any) -> bool:
    return str(node.meta["val"].shape[0]) == str(x.meta["val"].shape[0])


def _check_float(node: Any) -> None:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        raise refused("float32 values", f"{node.name}: {value.dtype}")


def _sizes(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    if len(shape) != count:
        raise refused(f"images of {count} sizes", list(shape))
    return shape


_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_RULES: dict[Any, Callable[..., None]] = {
    _aten.linear.default: _Lowering._linear,
    _aten.conv2d.default: _Lowering._convolution,
    _aten.max_pool2d.default: _Lowering._max_pool,
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
    **dict.fromkeys(_SUMS, _Lowering._sum),
    **dict.fromkeys(ACTS, _Lowering._alone),
    **dict.fromkeys(
        (_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default,
         _aten.unflatten.int, _aten.squeeze.dims, _aten.squeeze.dim, _aten.unsqueeze.default),
        _Lowering._reshape,
    ),
    **dict.fromkeys((_aten.dropout.default, _aten.feature_dropout.default), _Lowering._drop),
    **dict.fromkeys(
        (_aten.detach.default, _aten.alias.default, _aten.contiguous.default, _aten.clone.default,
         _aten._assert_tensor_metadata.default),
        _Lowering._same,
    ),
}  # fmt: skip
