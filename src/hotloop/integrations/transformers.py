"""``HotloopTrainer``: Transformers' ``Trainer`` whose forward and backward run as a program.

Accumulation, clipping, the optimizer's step, schedules, callbacks, logs and checkpoints are
Transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError
from ..memory.tree import Arguments
from ..step.gradients import GradientStep

try:
    from transformers import Trainer
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] not in ("transformers", "accelerate"):
        raise
    raise MissingExtraError(
        "hotloop.integrations.transformers", "transformers", "transformers"
    ) from None


class _Loss(nn.Module):
    """What one ``training_step`` reads: the model, and code that a user may have changed."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Guards follow the code of functions that are attributes.
        self.compute_loss = trainer.compute_loss
        self.compute_loss_func = trainer.compute_loss_func
        self.smoother = trainer.label_smoother


class HotloopTrainer(Trainer):  # type: ignore[misc]
    """Transformers' ``Trainer`` on the fast step; the same arguments, the same losses.

    Forward and backward of each batch are recorded twice and run as a program from then on, one
    for each shape of batch. What cannot become a program stays as it is, and ``hotloop_reason``
    says why.
    """

    _hotloop: GradientStep | None = None
    _hotloop_of: tuple[Any, ...] = ()
    _hotloop_refusal: str | None = None

    @property
    def hotloop_path(self) -> str:
        """``"compiled"``: batches of a shape run as a program; ``"plain"``."""
        return "plain" if self._hotloop is None else self._hotloop.path

    @property
    def hotloop_reason(self) -> str:
        """Why the last step ran as it did."""
        if self._hotloop_refusal is not None or self._hotloop is None:
            return self._hotloop_refusal or "no step was made yet"
        return self._hotloop.reason

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Loss of a batch, its gradients added; as ``Trainer.training_step``."""

        def plain() -> torch.Tensor:
            loss: torch.Tensor = super(HotloopTrainer, self).training_step(
                model, inputs, num_items_in_batch
            )
            return loss

        self._hotloop_refusal = self._refusal(model)
        if self._hotloop_refusal is not None:
            return plain()
        parts = (model, self.optimizer, self.compute_loss_func, self.label_smoother)
        if self._hotloop is None or any(
            a is not b for a, b in zip(parts, self._hotloop_of, strict=True)
        ):
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            self._hotloop = GradientStep(_Loss(self, model), optimizer)
            self._hotloop_of = parts
        model.train()
        reads = (
            self.current_gradient_accumulation_steps,
            self.model_accepts_loss_kwargs,
            getattr(self, "loss_is_scaled_for_ga", None),
            getattr(self.label_smoother, "epsilon", None),
        )
        return self._hotloop(Arguments(inputs, num_items_in_batch, reads), plain)

    def _refusal(self, model: nn.Module) -> str | None:
        """Why forward and backward are Transformers' own; ``None``: they need not be."""
        if self.args.n_gpu > 0 or str(self.args.device) != "cpu":
            return f"the model is on {self.args.device}"
        if self.accelerator.mixed_precision != "no":
            return f"mixed precision is {self.accelerator.mixed_precision}"
        if str(getattr(self.accelerator.distributed_type, "value", "")) != "NO":
            return "there are several processes"
        if self.args.torch_empty_cache_steps is not None:
            return "torch_empty_cache_steps is set"
        return None
