"""The gradients of one chunk of a batch, in the form in which adding them up is cheapest.

The gradient of a linear layer's weight is a product of two factors, ``left^T @ right`` with
``left`` ``[rows, out]`` and ``right`` ``[rows, in]``. Rows of all chunks one below the other give
the gradient of the whole batch, so chunks that hand over factors need no addition, and a weight
larger than its factors is touched once a step however many chunks there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..graph import operators

_aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """What a chunk hands over for one weight.

    Attributes:
        outputs: numbers of the graph's results: none (the weight has no gradient), the gradient, or
            ``left`` and ``right``.
        shapes: of these results.
    """

    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


def parts_of(
    joint: Any, weights: Sequence[tuple[str, torch.Tensor]], gradients: dict[str, int]
) -> list[Part]:
    """Change the results of ``joint`` so that it hands over factors where they are smaller.

    Args:
        joint: graph of forward and backward. weights: names and tensors.
        gradients: number of the result that is a weight's gradient.
    """
    (end,) = [n for n in joint.graph.nodes if n.op == "output"]
    results = list(end.args[0])
    parts = []
    for name, weight in weights:
        if name not in gradients:
            parts.append(Part((), ()))
            continue
        at = gradients[name]
        plain = weight.dim() == 2 and weight.is_contiguous()
        found = operators.product_behind(results[at]) if plain else None
        if found is not None:
            a, b, transposed, _ = found
            rows = a.meta["val"].shape[1]
            if rows * sum(weight.shape) < weight.numel():
                with joint.graph.inserting_before(end):
                    # gradient = a @ b, or its transpose b^T @ a^T.
                    left = b if transposed else operators.transpose(joint, a)
                    right = operators.transpose(joint, a) if transposed else b
                parts.append(
                    Part(
                        (len(results), len(results) + 1),
                        ((rows, weight.shape[0]), (rows, weight.shape[1])),
                    )
                )
                results += [left, right]
                results[at] = None
                continue
        parts.append(Part((at,), (tuple(weight.shape),)))
    end.args = (tuple(results),)
    joint.graph.eliminate_dead_code()
    joint.recompile()
    return parts


def hand_over(
    parts: Sequence[Part], results: Sequence[Any], states: Sequence[torch.Tensor], weight: Any
) -> None:
    """Overwrite the states by what the parts name, times ``weight``, while tracing."""
    left = list(states)
    for part in parts:
        for number, at in enumerate(part.outputs):
            value = results[at] if number else results[at] * weight
            left.pop(0).copy_(value)
