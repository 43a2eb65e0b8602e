"""What is known of ATen's operations: which write where they are told, which compute nothing."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from . import operators  # noqa: F401 - hotloop's own are defined there.

_own: Any = torch.ops.hotloop
_aten: Any = torch.ops.aten


def _onednn(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor
) -> torch.Tensor:
    return out.copy_(torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], ""))


def _relu(x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.clamp_min.out(x, 0, out=out)  # type: ignore[no-any-return]


# Beside the element-wise ones: operations whose results may be given memory. Others may resize it:
# mse_loss makes a matrix of its result before it sums.
_WRITES_WHERE_TOLD = (
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._log_softmax.default,
    _aten._log_softmax_backward_data.default,
    _aten._softmax.default,
    _aten._softmax_backward_data.default,
    _aten.nll_loss_forward.default,
    _aten.nll_loss_backward.default,
    _aten.sum.dim_IntList,
    _aten.mean.dim,
    _aten.threshold_backward.default,
    _aten.tanh_backward.default,
    _aten.sigmoid_backward.default,
    _aten.gelu_backward.default,
    _aten.max_pool2d_with_indices.default,
    _aten.max_pool2d_with_indices_backward.default,
    _aten.cat.default,
)
# torch has no operation that writes these where it is told.
WRITTEN_HERE: dict[Any, Any] = {_own.onednn.default: _onednn, _aten.relu.default: _relu}
# Give memory whose values do not count.
EMPTY = (
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
# Give the same in each step, whatever the values of their arguments.
FILLED = (
    _aten.ones_like.default,
    _aten.zeros_like.default,
    _aten.full_like.default,
    _aten.ones.default,
    _aten.zeros.default,
    _aten.full.default,
    _aten.scalar_tensor.default,
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
)


def python_function(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What calls an operation at least cost: torch's own function where there is one, else ``op``.

    ``torch.tanh(x, out=y)`` takes 1.6 us where ``torch.ops.aten.tanh.out(x, out=y)`` takes 4.9: the
    latter looks for the schema's arguments in Python. The function is tried on tensors without
    memory first, and must give what the operation gives.
    """
    schema = getattr(op, "_schema", None)
    if schema is None or schema.name.split("::")[0] != "aten" or not _is_repeatable(op):
        return op
    function = getattr(torch._C._VariableFunctions, schema.name.split("::")[1], None)
    if function is None:
        return op
    try:
        given = tree_map_only(torch.Tensor, _without_memory, (args, kwargs))
        wanted, made = op(*given[0], **given[1]), function(*given[0], **given[1])
        same = _described(made) == _described(wanted)
    except (TypeError, RuntimeError, NotImplementedError):
        return op
    return function if same else op


def _is_repeatable(op: Any) -> bool:
    """Whether calling it once more on other memory changes nothing."""
    written = [a for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    drawn = torch.Tag.nondeterministic_seeded in op.tags
    return not drawn and all(a.is_out for a in written)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _described(result: Any) -> Any:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [(p.shape, p.stride(), p.dtype) for p in parts]


def writes(node: Any) -> bool:
    """Whether a node's operation writes into an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def out_names(op: Any) -> list[str]:
    """Names of the arguments that say where results go."""
    return [a.name for a in op._schema.arguments if a.is_out]


@functools.cache
def out_variant(op: Any) -> Any:
    """The operation that writes where it is told; ``None``: there is none to trust."""
    if op in WRITTEN_HERE:
        return WRITTEN_HERE[op]
    schema = getattr(op, "_schema", None)
    if op not in _WRITES_WHERE_TOLD and torch.Tag.pointwise not in getattr(op, "tags", ()):
        return None
    if schema is None or any(str(r.type) != "Tensor" for r in schema.returns):
        return None
    packet = op.overloadpacket
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    for name in packet.overloads():
        found = getattr(packet, name)
        outs = [a for a in found._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in found._schema.arguments if not a.is_out]
        if len(outs) == len(schema.returns) and rest == wanted and outs:
            # One that torch's generator wrote computes into memory of its own and copies.
            return None if torch.Tag.generated in found.tags else found
    return None
