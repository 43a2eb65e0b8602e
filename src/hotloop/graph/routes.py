"""Which library makes each matrix product of a graph: chosen by timing them at its shape.

Candidates, all exact to float32 rounding: MKL (what ``torch.mm`` calls), oneDNN, and hotloop's own
product, which can apply bias, relu or relu's backward mask while the result is in registers. A step
in bfloat16 has one more: the latter with its factors rounded (``gemm_bf16.cpp`` of ``kernels``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from ..kernels import calls as kernel_calls
from ..machine.threads import num_threads as threads_set
from ..measure import Timing, least_seconds
from ..memory import TensorArena
from . import epilogues
from .choices import LIMIT_S, ROUNDS, Route, choose, operand
from .epilogues import Epilogue, epilogue_of
from .nodes import remove_dead
from .operators import PRODUCTS, ROUNDED_UPDATES

_aten = torch.ops.aten
_own: Any = torch.ops.hotloop
# Multiplications of a product. Of 1,000 smaller ones hotloop's kernel was the fastest of 85 %, and
# within a fifth for most others: a microsecond at stake.
_UNTIMED = 10_000
# oneDNN's set-up of 30 to 100 us alone takes longer than what smaller ones take elsewhere.
_ONEDNN_FROM = 1_000_000


class Product(NamedTuple):
    """Shape and layout of ``a[m, k] @ b[k, n]``; ``t`` in ``layout``: transposed."""

    m: int
    k: int
    n: int
    layout: str
    bias: bool
    num_threads: int
    rounds: bool = False  # Whether factors are rounded to bfloat16.


def route(
    graph: fx.GraphModule, num_threads: int, *, rounds: bool = False
) -> list[tuple[Product, Route]]:
    """Replace each float32 matrix product by the fastest kernel; products and their routes.

    Args:
        graph: as recorded, changed in place.
        num_threads: threads of the step.
        rounds: whether all of them round their factors to bfloat16, those of a weight's gradient
            and its update too.
    """
    chosen: list[tuple[Product, Route]] = []
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if rounds and node.target in ROUNDED_UPDATES:
            node.target = ROUNDED_UPDATES[node.target]
        if node.op != "call_function" or node.target not in PRODUCTS:
            continue
        found = _product(node, num_threads)
        if found is None:
            continue
        found = found._replace(rounds=rounds)
        choice = fastest(found)
        if rounds:  # The precision that was asked for, not what a neighbour's noise may prefer.
            choice = choice._replace(kernel="bfloat16")
        chosen.append((found, choice))
        if choice.kernel != "mkl":
            _replace(graph, node, choice.kernel)
    remove_dead(graph.graph)
    graph.recompile()
    return chosen


def fastest(product: Product) -> Route:
    """The fastest kernel for a product (``choices``)."""
    if product.m * product.k * product.n < _UNTIMED and not product.rounds:
        return Route("hotloop", {})  # A race would take longer than a thousand steps can win.
    kind, sizes = product._replace(m=0, k=0, n=0), (product.m, product.k, product.n)
    return choose(_key(product), lambda: race(product), ("product", *kind), sizes)


def _key(product: Product) -> str:
    return "product/" + "/".join(str(part) for part in product)


def _product(node: Any, num_threads: int) -> Product | None:
    a, b = (factor.meta["val"] for factor in node.args[-2:])
    if a.dtype != torch.float32 or b.dtype != torch.float32 or node.kwargs:
        return None
    bias = node.target is _aten.addmm.default
    if bias and node.args[0].meta["val"].dim() != 1:
        return None
    layout = ""
    for factor in (a, b):
        if factor.stride(1) == 1:
            layout += "n"
        elif factor.stride(0) == 1:
            layout += "t"
        else:
            return None
    return Product(a.shape[0], a.shape[1], b.shape[1], layout, bias, num_threads)


def _replace(graph: fx.GraphModule, node: Any, kernel: str) -> None:
    bias = node.args[0] if node.target is _aten.addmm.default else None
    a, b = node.args[-2:]
    if kernel == "onednn":
        epilogues.replace(graph.graph, node, Epilogue(node), _own.onednn.default, (a, b, bias))
        return
    found = epilogue_of(node, fits_mask=_has_adjacent_columns if bias is None else None)
    target = (_own.gemm_bf16 if kernel == "bfloat16" else _own.gemm).default
    args = (a, b, bias, found.mask, int(found.activation == "relu"))
    epilogues.replace(graph.graph, node, found, target, args)


def _has_adjacent_columns(value: torch.Tensor) -> bool:
    return value.dim() == 2 and value.stride(1) == 1


def race(product: Product) -> tuple[str, dict[str, float], bool]:
    """The fastest candidate, seconds of each, and whether the processors were ours."""
    seconds, quiet = _timed(product)
    # The interpreter's part of a call, which a program does not have.
    tiny = _tiny(product.bias, product.rounds)
    seconds = {name: max(s - tiny[name], 0.1 * s) for name, s in seconds.items()}
    return min(seconds, key=lambda name: seconds[name]), seconds, quiet


@functools.cache
def _tiny(bias: bool, rounds: bool) -> dict[str, float]:
    """Seconds of a product of one number: what the interpreter costs."""
    tiny = _timed(Product(1, 1, 1, "nn", bias, 1, rounds)).seconds
    # oneDNN's own set-up is there in both: what torch.mm costs is taken for its interpreter's part.
    return {**tiny, "onednn": tiny["mkl"]}


def _timed(product: Product) -> Timing:
    m, k, n, layout, has_bias, num_threads, rounds = product
    a = operand(k, m).t() if layout[0] == "t" else operand(m, k)
    b = operand(n, k).t() if layout[1] == "t" else operand(k, n)
    bias = operand(n) if has_bias else None
    out = torch.empty(m, n)
    calls: dict[str, Callable[[], Any]] = {
        "mkl": lambda: torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    }
    if torch.backends.mkldnn.is_available() and m * k * n >= _ONEDNN_FROM:
        turned = b.t()
        calls["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(
            a, turned, bias, "none", [], ""
        )
    own = functools.partial(kernel_calls.product, a, b, out, bias, num_threads=num_threads)
    calls["hotloop"] = own()
    if rounds:
        calls["bfloat16"] = own(bfloat16=True)
    with torch.no_grad(), threads_set(num_threads), TensorArena():
        repeats = max(1, int(2e-4 / (2 * m * k * n / 50e9 + 2e-6)))
        return least_seconds(calls, repeats, rounds=ROUNDS, limit_s=LIMIT_S, until_clear=True)
