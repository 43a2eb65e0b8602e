"""``GradientAccumulator``: one large batch's gradient from micro-batches, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..errors import InputError


class GradientAccumulator:
    """Adds micro-batch gradients in place, with no second copy of them.

    With ``weight = samples of the micro-batch / samples of the batch`` and a loss that is a mean
    over samples the sum is the gradient of the whole batch, up to float32 rounding.

    Args:
        parameters: whose gradients; gives shapes, strides and dtypes of the sums.

    Attributes:
        gradients: the sums, one tensor like each parameter.
        steps: micro-batches added since the last ``reset``.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self.gradients = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.steps = 0

    def update(self, gradients: Sequence[torch.Tensor | None], weight: float = 1.0) -> None:
        """Add ``weight * gradient`` to each sum; ``None`` adds nothing.

        Raises:
            InputError: not one gradient of the right shape for each parameter.
        """
        if len(gradients) != len(self.gradients):
            raise InputError(
                f"update needs {len(self.gradients)} gradients, one a parameter", got=len(gradients)
            )
        for total, gradient in zip(self.gradients, gradients, strict=True):
            if gradient is not None and gradient.shape != total.shape:
                raise InputError(
                    f"a gradient must have its parameter's shape {list(total.shape)}",
                    got=list(gradient.shape),
                )
        with torch.no_grad():
            for total, gradient in zip(self.gradients, gradients, strict=True):
                if gradient is None:
                    continue
                if self.steps == 0:
                    torch.mul(gradient, weight, out=total)
                else:
                    total.add_(gradient, alpha=weight)
        self.steps += 1

    def reset(self) -> None:
        """Begin the next batch: the next ``update`` overwrites."""
        if self.steps:
            torch._foreach_zero_(self.gradients)
        self.steps = 0

    def assign(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let each parameter's ``grad`` be its sum, for ``optimizer.step()``."""
        for parameter, total in zip(parameters, self.gradients, strict=True):
            parameter.grad = total
