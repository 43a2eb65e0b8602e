"""What follows a kernel's sums and is done before they reach memory: its epilogue.

A sum with another value, relu or gelu, relu's backward mask, pooling by 2x2: one function finds
them, for products and convolutions of a training step as for layers of inference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import fx

from . import layers
from . import operators as _registered  # noqa: F401
from .nodes import arguments, only_reader
from .windows import is_3x3, pair

_own: Any = torch.ops.hotloop
_aten: Any = torch.ops.aten
_RELUS = (_aten.relu.default, _aten.relu_.default)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_MAX_POOLS = (_aten.max_pool2d.default, _aten.max_pool2d_with_indices.default)
_GELUS = {"none": "gelu", "tanh": "tanh_gelu"}


class Epilogue(NamedTuple):
    """Nodes that a kernel does as well.

    Attributes:
        last: the last of them, whose value the kernel then gives; the kernel's node where there is
            none. taken: all of them, in order.
        addend: a value that is added.
        activation: ``"none"``, or of ``layers.ACTIVATIONS``.
        mask: where this value is not above 0, the result becomes 0.
        pool: pooling by 2x2.
    """

    last: Any
    taken: tuple[Any, ...] = ()
    addend: Any = None
    activation: str = "none"
    mask: Any = None
    pool: Any = None


def epilogue_of(
    node: Any,
    activations: Collection[str] = ("relu",),
    *,
    fits_addend: Callable[[Any, Any], bool] | None = None,
    fits_mask: Callable[[torch.Tensor], bool] | None = None,
    pools: bool = False,
) -> Epilogue:
    """What follows a node that its kernel can take along.

    Args:
        node: a product, convolution or the like.
        activations: names of those that the kernel has.
        fits_addend: whether a node's value can be added to another's by the kernel; ``None``: it
            adds nothing.
        fits_mask: whether a value's layout is one that the kernel reads as a mask; ``None``: it has
            no masks.
        pools: whether the kernel pools by 2x2, where nothing is added.
    """
    chain = [node]

    def take(find: Callable[[Any], Any]) -> Any:
        reader = only_reader(chain[-1])
        found = None if reader is None else find(reader)
        if found is not None:
            chain.append(reader)
        return found

    def find_activation(reader: Any) -> str | None:
        name = activation_of(reader)
        return name if name in activations else None

    addend = mask = pool = None
    if fits_addend is not None:
        addend = take(functools.partial(_addend, before=node, fits=fits_addend))
    activation = take(find_activation)
    if activation is None and fits_mask is not None:
        mask = take(functools.partial(_mask, before=chain[-1], fits=fits_mask))
    if pools and addend is None:
        pool = take(lambda reader: reader if pool_window(reader) == (2, 2) else None)
        if pool is not None and activation is None:  # relu of the greatest, the greatest of relus.
            activation = take(find_activation)
    return Epilogue(chain[-1], tuple(chain[1:]), addend, activation or "none", mask, pool)


def replace(
    graph: fx.Graph, node: Any, found: Epilogue, target: Any, args: Any, *, before: Any = None
) -> Any:
    """Put one call where a node and its epilogue are, or ``before`` another node."""
    with graph.inserting_before(before or found.last):
        new = graph.call_function(target, args)
    new.meta.update(found.last.meta)
    found.last.replace_all_uses_with(new)
    for done in (*reversed(found.taken), node):
        graph.erase_node(done)
    return new


def activation_of(node: Any) -> str | None:
    """The name in ``layers`` of what a node applies to each element; ``None``: it has none."""
    if node.target in _RELUS:
        return "relu"
    if node.target is _aten.gelu.default:
        return _GELUS.get(arguments(node)["approximate"])
    return None


def pool_window(node: Any) -> tuple[int, int] | None:
    """Height and width of max pooling over windows next to each other; ``None``: it is none."""
    if node.target is _own.pool.default:
        return pair(node.args[1:3])
    if node.target not in _MAX_POOLS:
        return None
    _, kernel, stride, padding, dilation, ceil_mode = arguments(node).values()
    alike = pair(stride or kernel) == pair(kernel)
    plain = pair(padding) == (0, 0) and pair(dilation) == (1, 1) and not ceil_mode
    return pair(kernel) if alike and plain else None


def _addend(node: Any, before: Any, fits: Callable[[Any, Any], bool]) -> Any:
    """What a sum adds to ``before``."""
    if node.target not in _SUMS or node.kwargs or len(node.args) != 2:
        return None
    if node.target is _aten.add_.Tensor and node.args[0].op == "placeholder":
        return None  # It writes into what is not of this graph.
    (other,) = [n for n in node.args if n is not before] or [None]
    return other if isinstance(other, fx.Node) and fits(other, before) else None


def _mask(node: Any, before: Any, fits: Callable[[torch.Tensor], bool]) -> Any:
    """The value that gates relu's backward, where ``before`` is the gradient."""
    if node.target is not _aten.threshold_backward.default:
        return None
    gradient, gate, threshold = node.args
    return gate if gradient is before and threshold == 0 and fits(gate.meta["val"]) else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two values have one shape, that of the batch included, and one dtype."""
    a, b = one.meta.get("val"), other.meta.get("val")
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    # As text: comparing two symbols would bind one to the other.
    return tensors and a.dtype == b.dtype and list(map(str, a.shape)) == list(map(str, b.shape))


def fuse(graph: fx.Graph) -> None:
    """Make layers (``layers``) of products, convolutions and the like with what follows them.

    Args:
        graph: of inference, from ``torch.export``; changed in place. Calls that no layer takes
            stay as they are.
    """
    made_before: set[Any] = set()
    absorbed: set[Any] = set()

    def fits(other: Any, before: Any) -> bool:
        return other in made_before and _alike(other, before)

    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        rule = _RULES.get(node.target) if node not in absorbed else None
        made = None if rule is None else rule(node, fits)
        if made is not None:
            layer, args, found = made
            absorbed.update(found.taken)
            node = replace(graph, node, found, layer, args, before=node)
        made_before.add(node)


# A layer, its arguments, and the nodes after it that it does as well.
_Layer = tuple[Callable[..., Any], tuple[Any, ...], Epilogue]


def _linear(node: Any, fits: Callable[[Any, Any], bool]) -> _Layer:
    x, weight, bias = arguments(node).values()
    found = epilogue_of(node, layers.ACTIVATIONS, fits_addend=fits)
    return layers.linear, (x, weight, bias, found.addend, found.activation), found


def _convolution(node: Any, fits: Callable[[Any, Any], bool]) -> _Layer | None:
    x, weight, bias, stride, padding, dilation, groups = arguments(node).values()
    if groups != 1 or pair(dilation) != (1, 1):
        return None
    small = is_3x3(tuple(weight.meta["val"].shape[2:]), stride, padding)
    found = epilogue_of(node, fits_addend=fits, pools=small)
    windows = pair(stride), pair(padding)
    pooled = found.pool is not None
    args = (x, weight, bias, found.addend, *windows, found.activation, pooled)
    return layers.convolution, args, found


def _max_pool(node: Any, _: Any) -> _Layer | None:
    x, kernel, stride, padding, dilation, ceil_mode = arguments(node).values()
    if pair(dilation) != (1, 1) or ceil_mode:
        return None
    found = epilogue_of(node, layers.ACTIVATIONS)
    windows = pair(kernel), pair(stride or kernel), pair(padding)
    return layers.max_pool, (x, *windows, found.activation), found


def _sum(node: Any, _: Any) -> _Layer | None:
    x, addend, alpha = arguments(node).values()
    if not all(isinstance(n, fx.Node) for n in (x, addend)) or not _alike(x, addend) or alpha != 1:
        return None
    found = epilogue_of(node, layers.ACTIVATIONS)
    return layers.pointwise, (x, addend, found.activation), found


def _activation(node: Any, _: Any) -> _Layer | None:
    name = activation_of(node)
    return None if name is None else (layers.pointwise, (node.args[0], None, name), Epilogue(node))


_RULES: dict[Any, Callable[[Any, Any], _Layer | None]] = {
    _aten.linear.default: _linear,
    _aten.conv2d.default: _convolution,
    _aten.max_pool2d.default: _max_pool,
    _aten.gelu.default: _activation,
    **dict.fromkeys(_RELUS, _activation),
    **dict.fromkeys(_SUMS, _sum),
}
