"""Where a program's time goes: each matrix product and convolution, timed alone.

The times are those of the kernels by themselves, on data of their own at the graph's shapes, once
for each machine; what they leave of a measured step is everything else (pointwise loops, pooling,
the update of small tensors) and what the operations cost each other in the caches.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import conv_flop_count

from ..graph.choices import Route, choose
from ..graph.convolutions import Convolution
from ..graph.convolutions import race as race_convolutions
from ..graph.operators import GEMM_UPDATES, ROUNDED_UPDATES
from ..graph.routes import Product
from ..graph.routes import race as race_products
from ..kernels.binding import UpdateRule
from ..kernels.calls import product_update
from ..machine.threads import num_threads as threads_set
from ..measure import least_seconds
from ..memory import TensorArena

_aten = torch.ops.aten
_FLOAT_BYTES = 4
# A larger weight is timed by its first rows, which keeps what timing takes below 64 MiB.
_MOST_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True)
class Operation:
    """One kind of work in a step.

    Attributes:
        kind: ``"product"``, ``"product and update"``, ``"convolution"``, ``"convolution
            backward"``, or one half of that, ``"input gradient"`` or ``"weight gradient"``.
        shape: in words. count: how many such a step has. kernel: who computes it.
        seconds: of one, timed alone. flop: of one; of a convolution those of the direct sum, of
            which hotloop's kernel needs 16 in 36.
        modelled_bytes: each operand read and each result written once (updated weights and
            states: both), in float32; caches make the true traffic to memory more or less.
        candidates_s: least seconds of each kernel that was tried; one where there is no choice.
    """

    kind: str
    shape: str
    count: int
    kernel: str
    seconds: float
    flop: int
    modelled_bytes: int
    candidates_s: dict[str, float]

    def to_dict(self, step_s: float | None, ceiling_flop_per_s: float | None) -> dict[str, Any]:
        """For the report: rate, share of the ceiling, share of a step of ``step_s`` seconds."""
        rate = self.flop / self.seconds
        # Ceilings are measured in float32.
        ceiling = None if self.kernel == "bfloat16" else ceiling_flop_per_s
        return {
            "kind": self.kind,
            "shape": self.shape,
            "count": self.count,
            "kernel": self.kernel,
            "s": self.seconds,
            "flop": self.flop,
            "modelled_bytes": self.modelled_bytes,
            "flop_per_s": rate,
            "share_of_ceiling": rate / ceiling if ceiling else None,
            "time_share": self.count * self.seconds / step_s if step_s else None,
            "candidates_s": self.candidates_s,
        }


def operations(
    graph: fx.GraphModule,
    routes: Sequence[tuple[Product, Route]],
    convolutions: Sequence[tuple[Convolution, Route]],
    num_threads: int,
) -> list[Operation]:
    """The operations of a graph, the longest first.

    Args:
        graph: after ``routes.route`` and ``convolutions.route``.
        routes, convolutions: what these gave.
        num_threads: threads of the step.
    """
    found = []
    for (product, kernel), count in Counter((p, r.kernel) for p, r in routes).items():
        # Not timed where a shape near it stood for it: now it is, for the report.
        seconds = next(r.seconds for p, r in routes if p == product) or race_products(product)[1]
        shape = f"{product.m} x {product.k} x {product.n} {product.layout}"
        m, k, n = product.m, product.k, product.n
        found.append(
            Operation(
                kind="product", shape=shape, count=count, kernel=kernel, seconds=seconds[kernel],
                flop=2 * m * k * n, modelled_bytes=_FLOAT_BYTES * (m * k + k * n + m * n),
                candidates_s=dict(seconds),
            )
        )  # fmt: skip
    for (work, kernel), count in Counter((w, r.kernel) for w, r in convolutions).items():
        seconds = next(r.seconds for w, r in convolutions if w == work)
        seconds = seconds or race_convolutions(work)[1]
        sizes = [math.prod(shape) for shape in (work.x, work.w, work.out)]
        found.append(
            Operation(
                kind=work.part, shape=f"{list(work.x)} by {list(work.w)}", count=count,
                kernel=kernel, seconds=seconds[kernel], flop=work.flop,
                modelled_bytes=_FLOAT_BYTES * sum(sizes), candidates_s=dict(seconds),
            )
        )  # fmt: skip
    rest: Counter[_Timed] = Counter()
    for node in graph.graph.nodes:
        if node.target in GEMM_UPDATES or node.target in ROUNDED_UPDATES.values():
            rest[_of_update(node)] += 1
        elif node.target is _aten.convolution.default:
            rest[_of_convolution(node, backward=False)] += 1
        elif node.target is _aten.convolution_backward.default:
            rest[_of_convolution(node, backward=True)] += 1
    for other, count in rest.items():
        kernel, seconds = choose(
            f"{other}/{num_threads}", functools.partial(_race, other, num_threads)
        )
        found.append(
            Operation(
                kind=other.kind, shape=other.text(), count=count, kernel=kernel,
                seconds=seconds[kernel], flop=other.flop(), modelled_bytes=other.modelled_bytes(),
                candidates_s=seconds,
            )
        )  # fmt: skip
    return sorted(found, key=lambda o: -o.count * o.seconds)


@dataclass(frozen=True)
class _Timed:
    """Something to time: its kind and what defines it."""

    kind: str
    sizes: tuple[Any, ...]

    def flop(self) -> int:
        if self.kind == "product and update":
            m, k, n = self.sizes[:3]
            return int(2 * m * k * n)
        x, w, out, _, _, _, transposed, *_, mask = self.sizes
        forward = conv_flop_count(list(x), list(w), list(out), transposed=transposed)
        # Backwards: one such product for the gradient of the image, one for the weight's.
        return int(forward) * (sum(mask[:2]) if self.kind == "convolution backward" else 1)

    def modelled_bytes(self) -> int:
        if self.kind == "product and update":
            m, k, n, states, _ = self.sizes
            elements = m * k + k * n + 2 * m * n * (1 + states)
        else:
            x, w, out = (math.prod(shape) for shape in self.sizes[:3])
            # Backwards, the image's gradient reads the weight, and the weight's the image.
            passes = sum(self.sizes[-1][:2]) if self.kind == "convolution backward" else 1
            elements = out + (x + w) * passes
        return _FLOAT_BYTES * int(elements)

    def text(self) -> str:
        if self.kind == "product and update":
            return " x ".join(str(size) for size in self.sizes[:3])
        return f"{list(self.sizes[0])} by {list(self.sizes[1])}"


def _of_update(node: Any) -> _Timed:
    a, b = (node.args[at].meta["val"] for at in (1, 2))
    states = len(node.args) - 5
    kernel = "hotloop" if node.target in GEMM_UPDATES else "bfloat16"
    return _Timed("product and update", (a.shape[0], a.shape[1], b.shape[1], states, kernel))


def _of_convolution(node: Any, *, backward: bool) -> _Timed:
    shapes = [tuple(f.meta["val"].shape) for f in node.args[: 3 if backward else 2]]
    if backward:
        grad, x, w = shapes
        options, mask = node.args[4:10], tuple(node.args[10])
    else:
        (x, w), grad = shapes, tuple(node.meta["val"].shape)
        options, mask = node.args[3:9], ()
    frozen = tuple(tuple(o) if isinstance(o, (list, tuple)) else o for o in options)
    kind = "convolution backward" if backward else "convolution"
    return _Timed(kind, (x, w, grad, *frozen, mask))


def _race(work: _Timed, num_threads: int) -> tuple[str, dict[str, float], bool]:
    update = work.kind == "product and update"
    call, share = _update_call(work, num_threads) if update else (_convolution_call(work), 1.0)
    name = work.sizes[-1] if update else "onednn"
    # Results lie in memory that was used before, as in the step: fresh pages took 3.2 ms of 3.4.
    with torch.no_grad(), threads_set(num_threads), TensorArena():
        seconds, quiet = least_seconds({name: call})
    return name, {name: seconds[name] / share}, quiet


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _update_call(work: _Timed, num_threads: int) -> tuple[Callable[[], Any], float]:
    """The call, and the share of the rows it computes."""
    m, k, n, states, kernel = work.sizes
    rows = min(m, max(64, _MOST_ELEMENTS // n))
    a, b = _draw(k, rows).t(), _draw(k, n)
    weight, *state = (torch.full((rows, n), 0.1) for _ in range(1 + states))
    # The rule with so many states: sgd, momentum, adam.
    rule = UpdateRule(kind=(0, 1, 3)[states], lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8,
                      bias_correction1=1.0, bias_correction2_sqrt=1.0, momentum=0.9)  # fmt: skip
    call = product_update(
        a, b, weight, state, rule, num_threads=num_threads, bfloat16=kernel == "bfloat16"
    )
    return call, rows / m


def _convolution_call(work: _Timed) -> Callable[[], Any]:
    x, w, grad, *options, mask = work.sizes
    # As a program lays images out.
    layout = torch.channels_last if len(x) == 4 else torch.contiguous_format
    image, weight = (_draw(*s).contiguous(memory_format=layout) for s in (x, w))
    given = [list(o) if isinstance(o, tuple) else o for o in options]
    if work.kind == "convolution":
        return lambda: _aten.convolution.default(image, weight, None, *given)
    gradient = _draw(*grad).contiguous(memory_format=layout)
    bias = [w[0]] if mask[2] else None
    return lambda: _aten.convolution_backward.default(
        gradient, image, weight, bias, *given, list(mask)
    )
