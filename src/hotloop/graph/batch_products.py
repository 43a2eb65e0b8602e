"""Which library makes each batched product of a graph: chosen by timing MKL's and hotloop's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from ..kernels import calls
from ..machine.threads import num_threads as threads_set
from ..measure import least_seconds
from ..memory import TensorArena
from . import native
from .choices import LIMIT_S, ROUNDS, Route, choose, operand

_aten: Any = torch.ops.aten


class BatchProduct(NamedTuple):
    """``a[batch, m, k] @ b[batch, k, n]``; ``t`` in ``layout``: transposed."""

    batch: int
    m: int
    k: int
    n: int
    layout: str
    num_threads: int


def route(graph: fx.GraphModule, num_threads: int) -> None:
    """Replace batched products that hotloop's kernel makes faster, in place."""
    for node in graph.graph.nodes:
        if node.target is not _aten.bmm.default or node.kwargs:
            continue
        found = _product(node, num_threads)
        if found is not None and fastest(found).kernel == "hotloop":
            node.target = native.batch_product
    graph.recompile()


def _product(node: Any, num_threads: int) -> BatchProduct | None:
    a, b = (factor.meta["val"] for factor in node.args)
    out = node.meta["val"]
    if {t.dtype for t in (a, b, out)} != {torch.float32} or out.numel() == 0 or not a.shape[2]:
        return None
    if not out.is_contiguous():
        return None
    layout = ""
    for factor in (a, b):
        if 1 not in factor.stride()[1:]:
            return None
        layout += "n" if factor.stride(2) == 1 else "t"
    batch, m, k = a.shape
    return BatchProduct(batch, m, k, b.shape[2], layout, num_threads)


def fastest(product: BatchProduct) -> Route:
    """The fastest kernel for a product (``choices``)."""
    key = "batch-product/" + "/".join(str(part) for part in product)
    kind = product._replace(batch=0, m=0, k=0, n=0)
    return choose(key, lambda: _race(product), ("batch product", *kind), product[:4])


def _race(product: BatchProduct) -> tuple[str, dict[str, float], bool]:
    batch, m, k, n, layout, num_threads = product
    a = operand(batch, k, m).mT if layout[0] == "t" else operand(batch, m, k)
    b = operand(batch, n, k).mT if layout[1] == "t" else operand(batch, k, n)
    out = torch.empty(batch, m, n)
    candidates = {
        "mkl": calls.torch_product(a, b, out),
        "hotloop": calls.batch_product(a, b, out, num_threads=num_threads),
    }
    with torch.no_grad(), threads_set(num_threads), TensorArena():
        repeats = max(1, int(2e-4 / (2 * batch * m * k * n / 20e9 + 2e-6)))
        seconds, quiet = least_seconds(
            candidates, repeats, rounds=ROUNDS, limit_s=LIMIT_S, until_clear=True
        )
    return min(seconds, key=lambda name: seconds[name]), seconds, quiet
