"""Which kernel makes each convolution of a graph: chosen by timing oneDNN and hotloop's own.

hotloop's (``kernels/cpp/convolution.h``) takes small filters with stride 1 on images whose channels
are adjacent, and does what follows in the same pass: bias and relu, relu's backward mask, pooling
by 2x2. Where pooling follows, its gradient never becomes an image of the larger size either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from ..kernels import calls as kernel_calls
from ..machine.threads import num_threads as threads_set
from ..measure import least_seconds
from ..memory import TensorArena
from . import epilogues
from .choices import LIMIT_S, ROUNDS, Route, choose
from .epilogues import epilogue_of
from .nodes import parts, remove_dead, take_parts
from .windows import is_small_filter, pair

_aten = torch.ops.aten
_own = torch.ops.hotloop
_LAST = torch.channels_last
# The sums that make a weight's gradient, in 8 parts: 32 MiB. 3x3 filters have 16 points.
_MOST_SUMS = 1024 * 1024
_FEW_CHANNELS = 8  # As in the kernel.


class Convolution(NamedTuple):
    """One pass of a convolution: ``x`` ``[N, C, H, W]`` with ``w`` ``[O, C, KH, KW]``, stride 1.

    Attributes:
        part: ``"convolution"``, ``"input gradient"`` or ``"weight gradient"``.
        padding: rows and columns of zeros on each side.
        relu: whether relu follows, which oneDNN would leave to a pass of its own.
        pooled: whether pooling by 2x2 follows, which it would too, forward and backward.
    """

    part: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    padding: tuple[int, int]
    num_threads: int
    relu: bool = False
    pooled: bool = False

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the results, before they are pooled."""
        (n, _, h, w), (ph, pw) = self.x, self.padding
        o, _, kh, kw = self.w
        return n, o, h + 2 * ph - kh + 1, w + 2 * pw - kw + 1

    @property
    def flop(self) -> int:
        """Of a direct sum, whichever way it is made."""
        return 2 * math.prod(self.out) * math.prod(self.w[1:])


def route(graph: fx.GraphModule, num_threads: int) -> list[tuple[Convolution, Route]]:
    """Replace convolutions that hotloop's kernel makes faster; those, and the times."""
    chosen: list[tuple[Convolution, Route]] = []
    nodes: list[Any] = list(graph.graph.nodes)
    for node in nodes:
        if node.target is _aten.convolution.default:
            chosen += _forward(graph, node, num_threads)
        elif node.target is _aten.convolution_backward.default:
            chosen += _backward(graph, node, num_threads)
    remove_dead(graph.graph)
    graph.recompile()
    return chosen


def _shape(x: Any, w: Any, options: Any, part: str, num_threads: int) -> Convolution | None:
    """The convolution, if it is of the kind that hotloop's kernel takes."""
    image, weight = x.meta["val"], w.meta["val"]
    stride, padding, dilation, transposed, _, groups = options
    if image.dtype != torch.float32 or weight.dtype != torch.float32 or image.dim() != 4:
        return None
    plain = not transposed and groups == 1 and pair(dilation) == (1, 1)
    if not plain or not is_small_filter(tuple(weight.shape[2:]), stride, padding):
        return None
    outputs, channels, kh, kw = weight.shape
    if outputs < 8 or outputs * channels * max(16, kh * kw) > _MOST_SUMS or not _adjacent(x):
        return None
    sizes = tuple(image.shape), tuple(weight.shape), pair(padding)
    found = Convolution(part, *sizes, num_threads)
    return found if min(found.out) > 0 else None


def _adjacent(node: Any) -> bool:
    return _is_adjacent(node.meta["val"])


def _is_adjacent(image: torch.Tensor) -> bool:
    """Whether channels are adjacent."""
    return image.is_contiguous(memory_format=_LAST)


def _forward(graph: fx.GraphModule, node: Any, num_threads: int) -> list[tuple[Convolution, Route]]:
    x, w, bias, *options = node.args
    found = _shape(x, w, options, "convolution", num_threads)
    if found is None or not _adjacent(node):
        return []
    then = epilogue_of(node, pools=True)
    relu = then.activation == "relu"
    found = found._replace(relu=relu, pooled=then.pool is not None)
    choice = fastest(found)
    if choice.kernel != "hotloop":
        return []
    target, options = _own.convolve.default, [int(relu)]
    if then.pool is not None:
        _, _, _, relu_first, channels_last = then.pool.args
        target, options = _own.convolve_pool.default, [int(relu or relu_first), channels_last]
    epilogues.replace(graph.graph, node, then, target, (x, w, bias, *found.padding, *options))
    return [(found, choice)]


def _backward(
    graph: fx.GraphModule, node: Any, num_threads: int
) -> list[tuple[Convolution, Route]]:
    g, x, w, sizes, *options, mask = node.args
    results = parts(node)
    found = _shape(x, w, options, "weight gradient", num_threads)
    if found is None or not _adjacent(g) or len(results) != len(node.users):
        return []
    pooled = _is_pooled(g)
    chosen: dict[str, tuple[Convolution, Route]] = {}
    for number, part in enumerate(("input gradient", "weight gradient")):
        if mask[number] and number in results and (number or _adjacent(results[0])):
            work = found._replace(part=part, pooled=pooled)
            # Images of few channels are convolved directly; that has no gradient of the image.
            if number == 0 and w.meta["val"].shape[1] < _FEW_CHANNELS:
                continue
            choice = fastest(work)
            if choice.kernel == "hotloop":
                chosen[part] = work, choice
    if not chosen:
        return []
    ours = ["input gradient" in chosen, "weight gradient" in chosen, "weight gradient" in chosen]
    left = [wanted and not mine for wanted, mine in zip(mask, ours, strict=True)]
    own_g, argmax = g.args[:2] if pooled else (g, None)
    padding, call = found.padding, graph.graph.call_function
    with graph.graph.inserting_before(node):
        if any(left):
            rest = call(node.target, (g, x, w, sizes, *options, left))
            rest.meta.update(node.meta)
            take_parts(rest, {n: old for n, old in results.items() if left[n]})
        if ours[1]:
            last = not results[1].meta["val"].is_contiguous()
            target = _own.convolve_weight_gradient.default
            new = call(target, (x, own_g, w, argmax, *padding, int(last)))
            new.meta["val"] = target(
                *(a.meta["val"] if isinstance(a, fx.Node) else a for a in new.args)
            )
            take_parts(new, {n - 1: old for n, old in results.items() if n > 0})
    if ours[0]:
        shape = results[0].meta["val"].shape
        then = epilogue_of(
            results[0], (), fits_mask=lambda gate: gate.shape == shape and _is_adjacent(gate)
        )
        target = _own.convolve_input_gradient.default
        args = (x, own_g, w, argmax, then.mask, *padding)
        epilogues.replace(graph.graph, results[0], then, target, args)
    return list(chosen.values())


def _is_pooled(g: Any) -> bool:
    """Whether a gradient is that of pooling by 2x2, as hotloop's kernel reads it."""
    if g.target is not _own.pool_backward.default or g.args[4:6] != (2, 2):
        return False
    return _adjacent(g.args[0]) or g.args[0].meta["val"].is_contiguous()


def fastest(work: Convolution) -> Route:
    """The fastest kernel for a pass (``choices``)."""
    batch, channels, *size = work.x
    kind = work._replace(x=(channels,))
    key = "/".join(str(part) for part in work)
    return choose(key, lambda: race(work), ("convolution", *kind), (batch, *size))


def race(work: Convolution) -> tuple[str, dict[str, float], bool]:
    """The fastest candidate, seconds of each, and whether the processors were ours."""
    calls = _forward_calls(work) if work.part == "convolution" else _backward_calls(work)
    with torch.no_grad(), threads_set(work.num_threads), TensorArena():
        seconds, quiet = least_seconds(calls, rounds=ROUNDS, limit_s=2 * LIMIT_S, until_clear=True)
    return min(seconds, key=lambda name: seconds[name]), seconds, quiet


def _filled(*shape: int) -> torch.Tensor:
    kind = _LAST if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, memory_format=kind).fill_(0.5)  # No kernel asks for the values.


def _options(work: Convolution) -> tuple[Any, ...]:
    return [1, 1], list(work.padding), [1, 1], False, [0, 0], 1


def _pooled(work: Convolution) -> tuple[torch.Tensor, torch.Tensor]:
    """Random values of the pooled results, and an argmax: no value is cut off, as may be."""
    n, o, h, w = work.out
    generator = torch.Generator().manual_seed(0)
    argmax = torch.empty((n, o, h // 2, w // 2), dtype=torch.uint8, memory_format=_LAST)
    argmax.random_(0, 4, generator=generator)
    return _filled(*argmax.shape), argmax.permute(0, 2, 3, 1)


def _forward_calls(work: Convolution) -> dict[str, Callable[[], Any]]:
    """With what follows: oneDNN leaves relu and pooling to another pass."""
    x, w, bias = _filled(*work.x), _filled(*work.w).contiguous(), _filled(work.w[0])
    out, options = torch.empty(work.out, memory_format=_LAST), _options(work)
    own: dict[str, Any] = {"relu": work.relu, "num_threads": work.num_threads}
    made = _pooled(work) if work.pooled else (out,)
    pool = kernel_calls.max_pool(out, *made, kernel=(2, 2), **own) if work.pooled else None

    def onednn() -> Any:
        result = _aten.convolution.default(x, w, bias, *options)
        if pool is not None:
            pool()
        return torch.relu_(result) if work.relu and pool is None else result

    own["padding"] = work.padding
    return {"onednn": onednn, "hotloop": kernel_calls.convolve(x, w, bias, *made, **own)}


def _backward_calls(work: Convolution) -> dict[str, Callable[[], Any]]:
    """From the gradient of the pooled results, where there is pooling."""
    x, w, bias = _filled(*work.x), _filled(*work.w).contiguous(), _filled(work.w[0])
    g, options = _filled(*work.out), _options(work)
    own: dict[str, Any] = {"num_threads": work.num_threads}
    small, argmax = _pooled(work) if work.pooled else (g, None)
    spread = None
    if argmax is not None:
        spread = kernel_calls.max_pool_gradient(small, argmax, g, kernel=(2, 2), **own)
    mask = [work.part == "input gradient", *[work.part == "weight gradient"] * 2]

    def onednn() -> Any:
        if spread is not None:
            spread()
        return _aten.convolution_backward.default(g, x, w, [len(bias)], *options, mask)

    own["padding"] = work.padding
    if work.part == "input gradient":
        made = torch.empty_like(x)
        return {
            "onednn": onednn,
            "hotloop": kernel_calls.convolve_input_gradient(small, w, made, argmax, **own),
        }
    gw, gb = torch.empty_like(w), torch.empty_like(bias)
    return {
        "onednn": onednn,
        "hotloop": kernel_calls.convolve_filter_gradient(x, small, gw, gb, argmax, **own),
    }
