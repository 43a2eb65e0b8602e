"""``compile_step``: model, loss and optimizer as one call that trains on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..plan import Plan
from .check import check_parts

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TrainStep:
    """One optimizer step a call, in place on model and optimizer.

    A batch larger than the micro-batch is cut; gradients of the parts are added in place, each
    part's loss weighted by its share of the batch, which for a loss that is a mean over samples
    is the gradient of the whole batch up to float32 rounding. A loss module with
    ``reduction="sum"`` is added without weights. Batch norm sees each part by itself.

    Attributes:
        path: ``"plain"``: forward, backward and update run as PyTorch runs them.
        reason: why this path.
    """

    path = "plain"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batch_size: int | None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.micro_batch_size = micro_batch_size
        self.reason = "the compiled path does not exist in this version"
        self._sums = getattr(loss_fn, "reduction", "mean") == "sum"

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Train on one batch.

        Args:
            x: samples, ``[batch, ...]``.
            y: targets, ``[batch, ...]``.

        Returns:
            The loss before the update, a detached scalar; of the whole batch.

        Raises:
            ModelError: the loss is not one number that depends on the parameters.
        """
        self.optimizer.zero_grad(set_to_none=True)
        micro = self.micro_batch_size
        if micro is None or micro >= len(x):
            total = self._backward(x, y, 1.0)
        else:
            total = torch.zeros(())
            for part_x, part_y in zip(x.split(micro), y.split(micro), strict=True):
                weight = 1.0 if self._sums else len(part_x) / len(x)
                total = total + self._backward(part_x, part_y, weight)
        self.optimizer.step()
        return total

    def _backward(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
        loss = self.loss_fn(self.model(x), y)
        if loss.dim() != 0 or not loss.requires_grad:
            raise ModelError(
                "the loss must be one number that depends on the model's parameters",
                got=f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}",
                next_step="use reduction='mean' and leave some parameters trainable",
            )
        if weight != 1.0:
            loss = loss * weight
        loss.backward()
        return loss.detach()


def compile_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: Sequence[torch.Tensor],
    plan: Plan | None = None,
) -> TrainStep:
    """A callable ``step(x, y) -> loss`` that makes one optimizer step, in place.

    ``model.training`` is left as it is; call ``model.train()`` first, as in PyTorch.

    Args:
        model: any ``torch.nn.Module``; any ``torch.optim.Optimizer`` on its parameters works
            but those that need a closure.
        loss_fn: ``loss_fn(model(x), y)`` gives a scalar, a mean over the samples.
        optimizer: built on the model's parameters.
        example: ``(x, y)``, one batch as later calls will give it.
        plan: ``memory.micro_batch_size`` is used; the defaults when ``None``.

    Raises:
        ModelError: model, loss or optimizer cannot be used, in one line.
    """
    check_parts(model, loss_fn, optimizer)
    example = _check_example(example)
    plan = plan or Plan()
    return TrainStep(model, loss_fn, optimizer, micro_batch_size=plan.memory.micro_batch_size)


def _check_example(example: Any) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        x, y = example
        same = len(x) == len(y)
    except (TypeError, ValueError):
        raise ModelError(
            "example must be (x, y), one batch of samples and targets",
            got=type(example).__name__,
            next_step="pass example=(x, y)",
        ) from None
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)) or not same:
        raise ModelError(
            "example must be two tensors with the same number of samples",
            got=", ".join(str(tuple(getattr(t, "shape", ()))) for t in (x, y)),
            next_step="pass example=(x, y)",
        )
    return x, y
