"""hotloop's own operators as calls of its kernels.

Some are torch operators (``operators``). The others are functions of this file, which are never
called: they are names for nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..data.hashing import mix
from ..kernels import binding, calls
from ..kernels.calls import Call
from . import operators

_own: Any = torch.ops.hotloop


def cross_entropy(x: Any, y: Any, weights: Any, mean: bool, ignore: int, scale: float) -> Any:
    """Loss and gradient of x, ``scale`` times."""


def squared_error(output: Any, target: Any, mean: bool, scale: float) -> Any:
    """Loss and gradient of the output, ``scale`` times."""


def column_sums(x: Any) -> Any:
    """``[1, cols]``."""


def softmax(x: Any, logarithm: bool, is_safe: bool) -> Any:
    """Over the last dimension."""


def softmax_gradient(result: Any, gradient: Any, logarithm: bool) -> Any:
    """The gradient of what ``result`` was made from."""


def layer_norm(x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Result, mean and reciprocal deviation."""


def layer_norm_gradient(g: Any, x: Any, mean: Any, rstd: Any, weight: Any, mask: Any) -> Any:
    """Gradients of x, weight and bias."""


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """Result and reciprocal root of the mean square."""


def rms_norm_gradient(g: Any, x: Any, rstd: Any, weight: Any, mask: Any) -> Any:
    """Gradients of x and weight."""


def row_sums(x: Any, divisor: int) -> Any:
    """Sums over the last dimension, divided."""


def batch_norm(
    x: Any, weight: Any, bias: Any, running: Any, momentum: float, epsilon: float, addend: Any,
    relu: bool,
) -> Any:  # fmt: skip
    """Result, mean and reciprocal deviation; running mean and variance are updated."""


def batch_norm_gradient(
    g: Any, x: Any, mean: Any, rstd: Any, weight: Any, mask: Any, wanted: Any
) -> Any:
    """Of the gradients of x, weight and bias those that are wanted, and what the mask leaves."""


def image_means(x: Any, divisor: int) -> Any:
    """Sums over the pixels, divided."""


def image_means_gradient(g: Any, mask: Any, divisor: int) -> Any:
    """The gradient of the images, 0 where mask is not above 0."""


def batch_product(a: Any, b: Any) -> Any:
    """``a[i] @ b[i]`` for each i."""


def copy(x: Any) -> Any:
    """The same values in another layout."""


def concatenate(parts: Any, dim: int, stacks: bool) -> Any:
    """Parts one after the other; stacks: each without that dimension."""


def placed(x: Any, dim: int, begin: int) -> Any:
    """Zeros, but for x: from ``begin`` on, or, where x lacks that dimension, at it."""


def add_count(count: Any, addend: int) -> Any:
    """A counter grows in place."""


def draw(probability: float, value: float) -> Any:
    """``value`` with this probability, else 0."""


def version(memory: Any, write: Any) -> Any:
    """What was there before the step, as it is after ``write``; the same memory."""


def optimizer_step(number: int, weights: Any, gradients: Any) -> Any:
    """Stands where the step of an optimizer is to be made."""


# They do more than give a result.
for _function in (batch_norm, add_count, draw, optimizer_step):
    torch.fx.node.has_side_effect(_function)


def embedding(table: Any, indices: Any) -> Any:
    """Rows of the table."""


def embedding_gradient(gradient: Any, indices: Any, padding_index: int) -> Any:
    """The gradient of the table."""


def random(key: Any, number: int, kind: str, a: float, b: float) -> Any:
    """Numbers from a key, of operation ``number`` (``drawing``)."""


def elementwise(chain: Any, *operands: Any) -> Any:
    """What a chain (``elementwise.Chain``) makes of its operands."""


def _elementwise(args: Any, outs: Any, threads: int) -> Call:
    chain, *operands = args
    tensors = [
        operand.as_strided(chain.shape, strides)
        for operand, strides in zip([*operands, *outs], chain.strides, strict=True)
    ]
    return calls.elementwise(chain.operations, tensors, chain.shape, num_threads=threads)


def _gemm(args: Any, outs: Any, threads: int, bfloat16: bool = False) -> Call:
    a, b, bias, mask, act = args
    return calls.product(
        a, b, outs[0], bias, mask, relu=bool(act), num_threads=threads, bfloat16=bfloat16
    )


def _pool(args: Any, outs: Any, threads: int) -> Call:
    x, kh, kw, relu, _ = args
    return calls.max_pool(x, *outs, kernel=(kh, kw), relu=bool(relu), num_threads=threads)


def _pool_backward(args: Any, outs: Any, threads: int) -> Call:
    g, argmax, _, _, kh, kw = args
    return calls.max_pool_gradient(g, argmax, outs[0], kernel=(kh, kw), num_threads=threads)


def _convolve(args: Any, outs: Any, threads: int) -> Call:
    x, w, bias, *padding, relu = args[:6]
    return calls.convolve(
        x, w, bias, *outs, padding=tuple(padding), relu=bool(relu), num_threads=threads
    )


def _input_gradient(args: Any, outs: Any, threads: int) -> Call:
    _, g, w, argmax, mask, *padding = args
    return calls.convolve_input_gradient(
        g, w, outs[0], argmax, mask, padding=tuple(padding), num_threads=threads
    )


def _filter_gradient(args: Any, outs: Any, threads: int) -> Call:
    x, g, _, argmax, *padding, _ = args
    filters, bias = outs
    return calls.convolve_filter_gradient(
        x, g, filters, bias, argmax, padding=tuple(padding), num_threads=threads
    )


def _cross_entropy(args: Any, outs: Any, threads: int) -> Call:
    x, y, weights, mean, ignore, scale = args
    return calls.cross_entropy(
        x, y, *outs, weights=weights, ignore_index=ignore, mean=mean, scale=scale,
        num_threads=threads,
    )  # fmt: skip


def _squared_error(args: Any, outs: Any, threads: int) -> Call:
    output, target, mean, scale = args
    return calls.squared_error(output, target, *outs, mean=mean, scale=scale, num_threads=threads)


def _column_sums(args: Any, outs: Any, threads: int) -> Call:
    x = args[0]
    if len(x.shape) > 2:
        cols = x.shape[-1]
        x = x.as_strided((math.prod(x.shape) // cols, cols), (cols, 1))
    return calls.column_sums(x, outs[0], num_threads=threads)


def _softmax(args: Any, outs: Any, threads: int) -> Call:
    x, logarithm, is_safe = args
    return calls.softmax(x, outs[0], logarithm=logarithm, is_safe=is_safe, num_threads=threads)


def _softmax_gradient(args: Any, outs: Any, threads: int) -> Call:
    result, gradient, logarithm = args
    return calls.softmax_gradient(
        result, gradient, outs[0], logarithm=logarithm, num_threads=threads
    )


def _layer_norm(args: Any, outs: Any, threads: int) -> Call:
    x, weight, bias, epsilon = args
    return calls.layer_norm(x, weight, bias, *outs, epsilon=epsilon, num_threads=threads)


def _layer_norm_gradient(args: Any, outs: Any, threads: int) -> Call:
    g, x, mean, rstd, weight, mask = args
    wanted = [out if want else None for out, want in zip(outs, mask, strict=True)]
    return calls.layer_norm_gradient(g, x, mean, rstd, weight, wanted, num_threads=threads)


def _rms_norm_gradient(args: Any, outs: Any, threads: int) -> Call:
    g, x, rstd, weight, mask = args
    given = [out if want else None for out, want in zip(outs, mask, strict=True)]
    return calls.rms_norm_gradient(g, x, rstd, weight, given, num_threads=threads)


def _batch_norm(args: Any, outs: Any, threads: int) -> Call:
    x, weight, bias, running, momentum, epsilon, addend, relu = args
    return calls.batch_norm(
        x, weight, bias, *outs, running=(running[0], running[1]), momentum=momentum,
        epsilon=epsilon, addend=addend, relu=relu, num_threads=threads,
    )  # fmt: skip


def _batch_norm_gradient(args: Any, outs: Any, threads: int) -> Call:
    g, x, mean, rstd, weight, mask, wanted = args
    given = iter(outs)
    gx, gw, gb, masked = (next(given) if want else None for want in wanted)
    return calls.batch_norm_gradient(
        g, x, mean, rstd, weight, [gx, gw, gb], mask=mask, masked_gradient=masked,
        num_threads=threads,
    )  # fmt: skip


def _image_means_gradient(args: Any, outs: Any, threads: int) -> Call:
    g, mask, divisor = args
    return calls.image_means_gradient(g, outs[0], mask, divisor=divisor, num_threads=threads)


def _copied(source: Any, target: Any, threads: int) -> Call:
    return calls.copy(source, target, element_bytes=target.element_size(), num_threads=threads)


def concatenate_targets(args: Any, out: torch.Tensor) -> Sequence[torch.Tensor]:
    """Where each part of a concatenation lies in it; ``args``: of the node or of the call."""
    parts, dim, stacks = args
    if stacks:
        return list(out.unbind(dim))
    sizes = [_shape(part)[dim] for part in parts]
    targets: Sequence[torch.Tensor] = out.split(sizes, dim)
    return targets


def _shape(part: Any) -> Sequence[int]:
    shape: Sequence[int] = (part.meta["val"] if hasattr(part, "meta") else part).shape
    return shape


def _concatenate(args: Any, outs: Any, threads: int) -> list[Call]:
    targets = concatenate_targets(args, outs[0])
    pairs = zip(args[0], targets, strict=True)
    # Some are made where they belong.
    left = [(p, t) for p, t in pairs if t.numel() and p.data_ptr() != t.data_ptr()]
    return [_copied(part, target, threads) for part, target in left]


def _placed(args: Any, outs: Any, threads: int) -> list[Call]:
    x, dim, begin = args
    zero = torch.zeros((), dtype=outs[0].dtype).expand(outs[0].shape)
    alike = len(x.shape) == outs[0].dim()
    target = outs[0].narrow(dim, begin, x.shape[dim]) if alike else outs[0].select(dim, begin)
    return [_copied(zero, outs[0], threads), _copied(x, target, threads)]


def _embedding_gradient(args: Any, outs: Any, threads: int) -> Call:
    gradient, indices, padding = args
    return calls.embedding_gradient(
        gradient, indices, outs[0], padding_index=padding, num_threads=threads
    )


def _random(args: Any, outs: Any, _: int) -> Call:
    key, number, kind, a, b = args
    return calls.random(key, outs[0], (mix(number, 0), mix(number, 1)), kind, a, b)


# Operator -> its calls, of arguments, results and a number of threads.
NATIVE: dict[Any, Callable[[Any, Sequence[torch.Tensor], int], Call | list[Call]]] = {
    _own.gemm.default: _gemm,
    _own.gemm_bf16.default: lambda args, outs, threads: _gemm(args, outs, threads, bfloat16=True),
    _own.pool.default: _pool,
    _own.pool_backward.default: _pool_backward,
    _own.convolve.default: _convolve,
    _own.convolve_pool.default: _convolve,
    _own.convolve_input_gradient.default: _input_gradient,
    _own.convolve_weight_gradient.default: _filter_gradient,
    cross_entropy: _cross_entropy,
    squared_error: _squared_error,
    column_sums: _column_sums,
    softmax: _softmax,
    softmax_gradient: _softmax_gradient,
    layer_norm: _layer_norm,
    layer_norm_gradient: _layer_norm_gradient,
    rms_norm: lambda args, outs, n: calls.rms_norm(
        args[0], args[1], *outs, epsilon=args[2], num_threads=n
    ),
    rms_norm_gradient: _rms_norm_gradient,
    row_sums: lambda args, outs, n: calls.row_sums(
        args[0], outs[0], divisor=args[1], num_threads=n
    ),
    batch_norm: _batch_norm,
    batch_norm_gradient: _batch_norm_gradient,
    image_means: lambda args, outs, n: calls.image_means(
        args[0], outs[0], divisor=args[1], num_threads=n
    ),
    image_means_gradient: _image_means_gradient,
    batch_product: lambda args, outs, n: calls.batch_product(
        args[0], args[1], outs[0], num_threads=n
    ),
    copy: lambda args, outs, n: _copied(args[0], outs[0], n),
    concatenate: _concatenate,
    placed: _placed,
    add_count: lambda args, outs, n: calls.add_count(*args),
    embedding: lambda args, outs, n: calls.embedding(args[0], args[1], outs[0], num_threads=n),
    embedding_gradient: _embedding_gradient,
    elementwise: _elementwise,
    random: _random,
}


def is_update(node: Any) -> bool:
    """Whether a node updates a weight."""
    return node.target in operators.UPDATES


def update_call(target: Any, args: Sequence[Any], threads: int) -> Call:
    """The call that updates a weight; its rule and scale are set before each step.

    Args:
        target: one of ``operators.UPDATES``.
        args: of the operator, up to its states.
    """
    rule = binding.UpdateRule()
    if target in operators.PRODUCT_UPDATES:
        w, a, b, *states = args
        if w.stride(1) != 1:
            w, a, b, states = w.t(), b.t(), a.t(), [state.t() for state in states]
        rounds = target in operators.ROUNDED_UPDATES.values()
        return calls.product_update(a, b, w, states, rule, num_threads=threads, bfloat16=rounds)
    w, g, *states = args
    return calls.update(w, g, states, rule, num_threads=threads)
