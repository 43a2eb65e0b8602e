"""hotloop's own operators as calls of its kernels.

Some are torch operators (``operators``). The others are functions of this file, which are never
called: they are names for nodes.
"""

from __future__ import annotations

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


def softmax(x: Any, logarithm: bool) -> Any:
    """Over the last dimension."""


def softmax_gradient(result: Any, gradient: Any, logarithm: bool) -> Any:
    """The gradient of what ``result`` was made from."""


def layer_norm(x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
    """Result, mean and reciprocal deviation."""


def layer_norm_gradient(g: Any, x: Any, mean: Any, rstd: Any, weight: Any, mask: Any) -> Any:
    """Gradients of x, weight and bias."""


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
    whole = chain.rows, chain.cols
    shapes = {"whole": whole, "row": (1, chain.cols), "column": (chain.rows, 1), "one": (1, 1)}
    tensors = [
        operand.as_strided(shapes[kind], (shapes[kind][1], 1))
        for operand, kind in zip([*operands, *outs], [*chain.kinds, "whole"], strict=True)
    ]
    return calls.elementwise(chain.operations, tensors, whole, num_threads=threads)


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
    return calls.convolve3x3(
        x, w, bias, *outs, padding=tuple(padding), relu=bool(relu), num_threads=threads
    )


def _input_gradient(args: Any, outs: Any, threads: int) -> Call:
    _, g, w, argmax, mask, *padding = args
    return calls.convolve3x3_input_gradient(
        g, w, outs[0], argmax, mask, padding=tuple(padding), num_threads=threads
    )


def _filter_gradient(args: Any, outs: Any, threads: int) -> Call:
    x, g, _, argmax, *padding, _ = args
    filters, bias = outs
    return calls.convolve3x3_filter_gradient(
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


def _softmax(args: Any, outs: Any, threads: int) -> Call:
    return calls.softmax(args[0], outs[0], logarithm=args[1], num_threads=threads)


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


def _embedding_gradient(args: Any, outs: Any, threads: int) -> Call:
    gradient, indices, padding = args
    return calls.embedding_gradient(
        gradient, indices, outs[0], padding_index=padding, num_threads=threads
    )


def _random(args: Any, outs: Any, _: int) -> Call:
    key, number, kind, a, b = args
    return calls.random(key, outs[0], (mix(number, 0), mix(number, 1)), kind, a, b)


# Operator -> its call, of arguments, results and a number of threads.
NATIVE: dict[Any, Callable[[Any, Sequence[torch.Tensor], int], Call]] = {
    _own.gemm.default: _gemm,
    _own.gemm_bf16.default: lambda args, outs, threads: _gemm(args, outs, threads, bfloat16=True),
    _own.pool.default: _pool,
    _own.pool_backward.default: _pool_backward,
    _own.conv3x3.default: _convolve,
    _own.conv3x3_pool.default: _convolve,
    _own.conv3x3_input_gradient.default: _input_gradient,
    _own.conv3x3_weight_gradient.default: _filter_gradient,
    cross_entropy: _cross_entropy,
    squared_error: _squared_error,
    column_sums: lambda args, outs, n: calls.column_sums(args[0], outs[0], num_threads=n),
    softmax: _softmax,
    softmax_gradient: _softmax_gradient,
    layer_norm: _layer_norm,
    layer_norm_gradient: _layer_norm_gradient,
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
