"""Operations on rows by hotloop's kernels: sums, softmax, layer norm, embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from . import native

_aten: Any = torch.ops.aten


def replace(graph: fx.GraphModule) -> None:
    """Give each operation that a kernel of hotloop's takes to it, in place."""
    for node in graph.graph.nodes:
        found = _RULES.get(node.target) if node.op == "call_function" else None
        if found is None or not _is_float(node):
            continue
        kernel = found(node)
        if kernel is not None:
            node.target, node.args = kernel
            node.kwargs = {}
    graph.recompile()


def _is_float(node: Any) -> bool:
    vals = node.meta["val"]
    parts = vals if isinstance(vals, (list, tuple)) else (vals,)
    return all(v is None or v.dtype == torch.float32 for v in parts)


def _dense(*nodes: Any) -> bool:
    vals = [n.meta["val"] for n in nodes if isinstance(n, fx.Node)]
    return all(v.is_contiguous() and v.numel() > 0 for v in vals)


def _sums(node: Any) -> Any:
    x, dims, *_keep = node.args
    val = x.meta["val"]
    if _is_last(val, dims) and not node.kwargs and _dense(x, node) and val.dtype == torch.float32:
        return native.row_sums, (x, 1)
    if val.dim() < 2 or val.dtype != torch.float32 or node.kwargs or dims is None:
        return None
    count = len(dims)
    if sorted(d % val.dim() for d in dims) != list(range(count)):
        return None
    if 0 < count < val.dim() - 1 and _dense(x, node):  # Sums of matrices: each is one row.
        return native.column_sums, (_matrix(node, x, math.prod(val.shape[:count])),)
    leading = count == val.dim() - 1
    rows = val.dim() == 2 and val.stride(1) == 1
    taken = leading and (rows or val.is_contiguous()) and val.numel() > 0
    return (native.column_sums, (x,)) if taken else None


def _matrix(node: Any, x: Any, rows: int) -> Any:
    """A dense value as a matrix of so many rows."""
    val = x.meta["val"]
    with node.graph.inserting_before(node):
        new = node.graph.call_function(_aten.view.default, (x, [rows, val.numel() // rows]))
    new.meta["val"] = torch.empty((rows, val.numel() // rows), dtype=val.dtype, device="meta")
    return new


def _contiguous(node: Any, x: Any) -> Any:
    """A value, copied before ``node`` where it is not dense row by row."""
    val = x.meta["val"]
    if val.is_contiguous():
        return x
    with node.graph.inserting_before(node):
        new = node.graph.call_function(native.copy, (x,))
    new.meta["val"] = torch.empty(val.shape, dtype=val.dtype, device="meta")
    return new


def _means(node: Any) -> Any:
    x, dims, *_keep = node.args
    val = x.meta["val"]
    taken = _is_last(val, dims) and not node.kwargs and _dense(x, node)
    return (native.row_sums, (x, val.shape[-1])) if taken and val.dtype == torch.float32 else None


def _is_last(val: torch.Tensor, dims: Any) -> bool:
    return val.dim() > 0 and dims is not None and [d % val.dim() for d in dims] == [val.dim() - 1]


def _rms_norm(node: Any) -> Any:
    x, shape, weight, epsilon = node.args
    val = x.meta["val"]
    if val.dtype != torch.float32 or not _dense(x, weight) or len(shape) != 1:
        return None
    small = torch.finfo(torch.float32).eps  # As torch takes it where none is given.
    return native.rms_norm, (x, weight, small if epsilon is None else epsilon)


def _rms_norm_gradient(node: Any) -> Any:
    gradient, x, shape, rstd, weight, mask = node.args
    if len(shape) != 1 or not _dense(gradient, x, rstd, weight) or not all(mask):
        return None
    if any(v is None for v in node.meta["val"]):
        return None
    return native.rms_norm_gradient, (gradient, x, rstd, weight, list(mask))


def _softmax(node: Any) -> Any:
    x, dim = node.args[:2]
    val, is_safe = x.meta["val"], node.target is _aten._safe_softmax.default
    if dim not in (-1, val.dim() - 1) or not _dense(x, node) or val.dtype != torch.float32:
        return None
    if is_safe and (node.kwargs or any(option is not None for option in node.args[2:])):
        return None
    return native.softmax, (x, node.target is _aten._log_softmax.default, is_safe)


def _softmax_gradient(node: Any) -> Any:
    gradient, result, dim, dtype = node.args
    last = dim in (-1, result.meta["val"].dim() - 1)
    if not last or dtype != torch.float32 or not _dense(gradient, result, node):
        return None
    logarithm = node.target is _aten._log_softmax_backward_data.default
    return native.softmax_gradient, (result, gradient, logarithm)


def _layer_norm(node: Any) -> Any:
    x, shape, weight, bias, epsilon = node.args
    val = x.meta["val"]
    if val.dtype != torch.float32 or not _dense(x, weight, bias) or len(shape) != 1:
        return None
    return native.layer_norm, (x, weight, bias, epsilon)


def _layer_norm_gradient(node: Any) -> Any:
    gradient, x, shape, mean, rstd, weight, _, mask = node.args
    if len(shape) != 1 or not _dense(x, mean, rstd, weight) or not gradient.meta["val"].numel():
        return None
    # What is not wanted has no shape.
    if any(want and val is None for want, val in zip(mask, node.meta["val"], strict=True)):
        return None
    if not all(mask):
        return None
    return native.layer_norm_gradient, (
        _contiguous(node, gradient),
        x,
        mean,
        rstd,
        weight,
        list(mask),
    )


def _embedding(node: Any) -> Any:
    table, indices = node.args[:2]
    val = indices.meta["val"]
    if val.dtype != torch.int64 or not _dense(table, indices, node):
        return None
    return native.embedding, (table, indices)


def _embedding_gradient(node: Any) -> Any:
    gradient, indices, _, padding, by_frequency = node.args
    val = indices.meta["val"]
    if by_frequency or val.dtype != torch.int64 or not _dense(gradient, indices, node):
        return None
    if math.prod(gradient.meta["val"].shape[:-1]) != val.numel():
        return None
    return native.embedding_gradient, (gradient, indices, padding)


_RULES = {
    _aten.sum.dim_IntList: _sums,
    _aten.mean.dim: _means,
    _aten._fused_rms_norm.default: _rms_norm,
    _aten._fused_rms_norm_backward.default: _rms_norm_gradient,
    _aten._softmax.default: _softmax,
    _aten._log_softmax.default: _softmax,
    _aten._safe_softmax.default: _softmax,
    _aten._softmax_backward_data.default: _softmax_gradient,
    _aten._log_softmax_backward_data.default: _softmax_gradient,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_gradient,
    _aten.embedding.default: _embedding,
    _aten.embedding_dense_backward.default: _embedding_gradient,
}
