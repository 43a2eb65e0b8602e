"""hotloop's own operators in a graph, and the passes that put them there.

They have no implementation: they are names for nodes, and ``native`` has the call of a kernel for
each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .nodes import remove_dead

_LIBRARY = torch.library.Library("hotloop", "FRAGMENT")
_STATES = ("", "Tensor(b!) s1, ", "Tensor(b!) s1, Tensor(c!) s2, ")
_TAGS = (torch.Tag.needs_exact_strides,)
# Products in float32, and of factors rounded to bfloat16 and summed in float32.
_GEMMS = ("gemm", "gemm_bf16")

for _count, _states in enumerate(_STATES):
    # w is updated by gradient g (times scale) with the rule in row `group` of control.
    _LIBRARY.define(
        f"update{_count}_(Tensor(a!) w, Tensor g, {_states}Tensor control, Tensor? scale, "
        "int group) -> ()",
        tags=_TAGS,
    )
    # The same with g = a @ b, which never reaches memory.
    for _gemm in _GEMMS:
        _LIBRARY.define(
            f"{_gemm}_update{_count}_(Tensor(a!) w, Tensor a, Tensor b, {_states}Tensor control, "
            "int group) -> ()",
            tags=_TAGS,
        )
    for _name in (f"update{_count}_", *(f"{_gemm}_update{_count}_" for _gemm in _GEMMS)):
        torch.library.register_fake(f"hotloop::{_name}", lambda *_: None, lib=_LIBRARY)

# a @ b (+ bias, then relu when act is 1; where mask > 0, else 0).
for _gemm in _GEMMS:
    _LIBRARY.define(
        f"{_gemm}(Tensor a, Tensor b, Tensor? bias, Tensor? mask, int act) -> Tensor", tags=_TAGS
    )
    torch.library.register_fake(
        f"hotloop::{_gemm}",
        lambda a, b, bias, mask, act: a.new_empty((a.shape[0], b.shape[1])),
        lib=_LIBRARY,
    )

# a @ b (+ bias) by oneDNN.
_LIBRARY.define("onednn(Tensor a, Tensor b, Tensor? bias) -> Tensor", tags=_TAGS)
torch.library.register_fake(
    "hotloop::onednn", lambda a, b, bias: a.new_empty((a.shape[0], b.shape[1])), lib=_LIBRARY
)

# Max pooling over windows next to each other, relu first where asked: the results, dense (`last`:
# channels adjacent), and a byte for each that says where in its window it lies, channels adjacent
# where x's are.
_FLEXIBLE = (torch.Tag.flexible_layout,)
_LIBRARY.define(
    "pool(Tensor x, int kh, int kw, int relu, int last) -> (Tensor, Tensor)", tags=_FLEXIBLE
)
# The gradient of x, by those bytes; its channels are adjacent where theirs are.
_LIBRARY.define(
    "pool_backward(Tensor g, Tensor argmax, int h, int w, int kh, int kw) -> Tensor",
    tags=_FLEXIBLE,
)


def _dense(
    shape: list[int], like: torch.Tensor, dtype: torch.dtype, last: bool | None = None
) -> torch.Tensor:
    """Dense, with channels adjacent where they are in ``like`` (or ``last`` says so)."""
    last = like.stride(1) == 1 if last is None else last
    return torch.empty(
        shape,
        dtype=dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _fake_pool(
    x: torch.Tensor, kh: int, kw: int, relu: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = [*x.shape[:2], x.shape[2] // kh, x.shape[3] // kw]
    return _dense(shape, x, x.dtype, bool(last)), _dense(shape, x, torch.uint8)


torch.library.register_fake("hotloop::pool", _fake_pool, lib=_LIBRARY)
torch.library.register_fake(
    "hotloop::pool_backward",
    lambda g, argmax, h, w, kh, kw: _dense([*argmax.shape[:2], h, w], argmax, g.dtype),
    lib=_LIBRARY,
)

# Convolution with a small filter and stride 1, channels of x adjacent (+ bias, then relu where
# asked).
_LIBRARY.define(
    "convolve(Tensor x, Tensor w, Tensor? bias, int pad_h, int pad_w, int relu) -> Tensor",
    tags=_TAGS,
)
# The same, pooled by 2x2 as `pool` does it.
_LIBRARY.define(
    "convolve_pool(Tensor x, Tensor w, Tensor? bias, int pad_h, int pad_w, int relu, int last)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)
# The gradient of x, 0 where mask is not above 0; and those of w (channels adjacent where `last`)
# and of the bias. g: the gradient of the results, or that of their pooling with its argmax.
_LIBRARY.define(
    "convolve_input_gradient(Tensor x, Tensor g, Tensor w, Tensor? argmax, Tensor? mask, int pad_h,"
    " int pad_w) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "convolve_weight_gradient(Tensor x, Tensor g, Tensor w, Tensor? argmax, int pad_h, int pad_w,"
    " int last) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def _convolved(x: torch.Tensor, w: torch.Tensor, pad_h: int, pad_w: int) -> list[int]:
    (n, _, h, v), (o, _, kh, kw) = x.shape, w.shape
    return [n, o, h + 2 * pad_h - kh + 1, v + 2 * pad_w - kw + 1]


def _fake_conv_pool(
    x: torch.Tensor, w: torch.Tensor, _: Any, pad_h: int, pad_w: int, __: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    n, c, h, v = _convolved(x, w, pad_h, pad_w)
    shape = [n, c, h // 2, v // 2]
    return _dense(shape, x, x.dtype, bool(last)), _dense(shape, x, torch.uint8, True)


torch.library.register_fake(
    "hotloop::convolve",
    lambda x, w, bias, ph, pw, relu: _dense(_convolved(x, w, ph, pw), x, x.dtype, True),
    lib=_LIBRARY,
)
torch.library.register_fake("hotloop::convolve_pool", _fake_conv_pool, lib=_LIBRARY)
torch.library.register_fake(
    "hotloop::convolve_input_gradient",
    lambda x, g, w, argmax, mask, ph, pw: _dense(list(x.shape), x, x.dtype, True),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "hotloop::convolve_weight_gradient",
    lambda x, g, w, argmax, ph, pw, last: (
        _dense(list(w.shape), w, w.dtype, bool(last)),
        w.new_empty(w.shape[0]),
    ),
    lib=_LIBRARY,
)

_aten = torch.ops.aten


def fuse(graph: fx.GraphModule) -> None:
    """Let the update of a weight whose gradient is one matrix product make that product itself."""
    nodes: list[Any] = list(graph.graph.nodes)
    updated = {memory_of(node.args[0]) for node in nodes if node.target in _FUSED}
    for node in nodes:
        if node.op != "call_function" or node.target not in _FUSED:
            continue
        found = product_behind(node.args[1])
        *states, control, scale, group = node.args[2:]
        if found is None or scale is not None:
            continue
        a, b, transposed, chain = found
        # Another weight may have been updated before this product is made.
        if memory_of(a) in updated or memory_of(b) in updated:
            continue
        with graph.graph.inserting_before(node):
            if transposed:  # g = (a @ b)^T = b^T @ a^T
                a, b = transpose(graph, b), transpose(graph, a)
            new = graph.graph.call_function(
                _FUSED[node.target], (node.args[0], a, b, *states, control, group)
            )
            new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        for dead in chain:
            graph.graph.erase_node(dead)
    remove_dead(graph.graph)
    graph.recompile()


def aliases(node: fx.Node) -> bool:
    """Whether the result is memory of the first argument."""
    schema: Any = getattr(node.target, "_schema", None)
    if node.meta.get("aliases"):
        return True
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def readers(node: fx.Node) -> list[Any]:
    """What is given a value's memory, through views too."""
    found: list[Any] = []
    for user in node.users:
        found += [user, *(readers(user) if aliases(user) else [])]
    return found


def memory_of(node: Any) -> Any:
    """The node whose memory a view is a part of; the node itself where it is no view."""
    while node.op == "call_function" and aliases(node):
        node = node.all_input_nodes[0]
    return node


_FUSED = {
    getattr(torch.ops.hotloop, f"update{n}_").default: getattr(
        torch.ops.hotloop, f"gemm_update{n}_"
    ).default
    for n in range(3)
}
GEMM_UPDATES = tuple(_FUSED.values())
# Matrix products as PyTorch calls them.
PRODUCTS = (_aten.mm.default, _aten.addmm.default)
# The same in bfloat16.
ROUNDED_UPDATES = {
    getattr(torch.ops.hotloop, f"gemm_update{n}_").default: getattr(
        torch.ops.hotloop, f"gemm_bf16_update{n}_"
    ).default
    for n in range(3)
}


def transpose(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A node for the transpose, where nodes are being inserted."""
    new = graph.graph.call_function(_aten.permute.default, (node, [1, 0]))
    new.meta["val"] = node.meta["val"].permute(1, 0)
    return new


def product_behind(node: Any) -> tuple[fx.Node, fx.Node, bool, list[fx.Node]] | None:
    """``mm`` behind a gradient used once, through transpositions: its factors and the way there."""
    transposed = False
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        arguments: Any = node.args
        chain.append(node)
        if node.target is _aten.mm.default:
            a, b = arguments
            if a.meta["val"].dtype != torch.float32:
                return None
            return a, b, transposed, chain
        if node.target in (_aten.permute.default, _aten.t.default):
            if node.target is _aten.permute.default and list(arguments[1]) != [1, 0]:
                return None
            transposed = not transposed
        elif node.target is _aten.view.default or node.target is _aten.reshape.default:
            if list(arguments[0].meta["val"].shape) != list(node.meta["val"].shape):
                return None
        elif node.target is not _aten.clone.default:
            return None
        node = arguments[0]
    return None


# Updates whose gradient is a product that they make themselves; all updates.
PRODUCT_UPDATES = (*GEMM_UPDATES, *ROUNDED_UPDATES.values())
UPDATES = (*_FUSED, *PRODUCT_UPDATES)
