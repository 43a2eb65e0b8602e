"""hotloop's own operators as calls of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import binding, calls
from ..kernels.calls import Call
from . import operators

_own: Any = torch.ops.hotloop


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
    return calls.convolve3x3_filter_gradient(
        x, g, *outs, argmax, padding=tuple(padding), num_threads=threads
    )


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
