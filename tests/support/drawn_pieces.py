"""Losses, optimizers and schedules for drawn programs."""

from __future__ import annotations

import numpy
import torch
from torch import nn
from torch.nn import functional as F

from support.drawn_models import CLASSES, Answer


def scores_of(answer):
    """The scores, whatever form the answer has."""
    if isinstance(answer, dict):
        return answer["scores"]
    if isinstance(answer, Answer):
        return answer.scores
    return answer[0] if isinstance(answer, tuple) else answer


def one_hot(y):
    return torch.eye(CLASSES)[y.clamp(min=0).remainder(CLASSES)]


class WithParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.weight = 1.0

    def forward(self, answer, y):
        scores = scores_of(answer).float()
        parts = torch.stack([F.cross_entropy(scores, y, ignore_index=255), scores.square().mean()])
        return self.weight * (torch.exp(-self.log_variance) * parts + self.log_variance).sum()


class WithBuffer(nn.Module):
    """Scores are centred on their running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES))
        self.weight = 1.0

    def forward(self, answer, y):
        scores = scores_of(answer).float()
        loss = F.cross_entropy(scores - self.centre, y, ignore_index=255)
        with torch.no_grad():
            self.centre.lerp_(scores.mean(0), 0.1)
        return self.weight * loss


class Annealed:
    """Counts its calls, as many schedules of a loss do."""

    def __init__(self):
        self.calls, self.weight = 0, 1.0

    def __call__(self, answer, y):
        self.calls += 1
        share = min(1.0, self.calls / 10)
        return self.weight * share * F.mse_loss(scores_of(answer).float(), one_hot(y))


def own_function(weight):
    def loss(answer, y):
        scores = scores_of(answer).float()
        return loss.weight * F.binary_cross_entropy_with_logits(scores, one_hot(y))

    loss.weight = weight
    return loss


def with_numpy(answer, y):
    scores = scores_of(answer).float()
    order = numpy.argsort(scores.detach().numpy()[:, 0])
    return F.mse_loss(scores[torch.from_numpy(order.copy())], one_hot(y))


def masked(answer, y):
    scores, keep = scores_of(answer).float(), y != 255
    each = F.cross_entropy(scores, y.where(keep, torch.zeros_like(y)), reduction="none")
    return (each * keep).sum() / keep.sum().clamp(min=1)


def picked(answer, y):
    """A choice of rows, whose number depends on the batch."""
    keep = y < 3
    return F.mse_loss(scores_of(answer).float()[keep], one_hot(y)[keep], reduction="sum") / len(y)


class Unwrapped(nn.Module):
    """A loss of torch.nn on the scores."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.weight = loss, 1.0

    def forward(self, answer, y):
        return self.weight * self.loss(scores_of(answer).float(), y)


LOSSES = {
    "cross entropy": lambda: Unwrapped(nn.CrossEntropyLoss(ignore_index=255)),
    "weighted": lambda: Unwrapped(
        nn.CrossEntropyLoss(torch.arange(1.0, 5.0), ignore_index=255, label_smoothing=0.1)
    ),
    "with parameters": WithParameters,
    "with a buffer": WithBuffer,
    "annealed": Annealed,
    "a function": lambda: own_function(1.0),
    "with numpy": lambda: with_numpy,
    "masked": lambda: masked,
    "picked": lambda: picked,
}


# ---- Optimizers and schedules --------------------------------------------------------------------


class OwnSign(torch.optim.Optimizer):
    """An optimizer of the user's own."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    mean = state.setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad.to_dense(), 1 - group["beta"])
                    p.sub_(group["lr"] * mean / (mean.abs() + 1e-2))


def by_group(params):
    params = list(params)
    half = len(params) // 2
    groups = [
        {"params": params[:half], "lr": 0.05, "momentum": 0.9},
        {"params": params[half:], "weight_decay": 0.01, "nesterov": True, "momentum": 0.8},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.02)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "groups": by_group,
    "maximize": lambda p: torch.optim.SGD(p, lr=0.001, maximize=True),
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=2e-3, eps=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, eps=1e-3, weight_decay=0.1),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(2e-3), eps=1e-3),
    "fused adam": lambda p: torch.optim.Adam(p, lr=2e-3, eps=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=2e-3, eps=1e-2, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "own": OwnSign,
}


def one_cycle(optimizer):
    name = "betas" if "betas" in optimizer.defaults else "momentum"
    cycles = all(group.get(name) for group in optimizer.param_groups)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.03, total_steps=40, cycle_momentum=cycles
    )


SCHEDULES = {
    "none": lambda o: None,
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + 0.1 * n)),
    "one cycle": one_cycle,
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
        ],
        milestones=[5],
    ),
}
