"""``TrainingParts``: what a trainer trains, and with which limits and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..step.check import LossFn


@dataclass(frozen=True)
class TrainingParts:
    """The user's own things; see ``Trainer`` for each."""

    model: nn.Module
    loss_fn: LossFn
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scheduler_interval: str
    clip_norm: float | None
    clip_value: float | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def limits(self) -> dict[str, Any]:
        """Limits of the gradient, as keywords of a step."""
        return {"clip_norm": self.clip_norm, "clip_value": self.clip_value}
