"""Loss and accuracy of a model on a data set."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..data import GlobalSampler, PackedDataset, Prefetcher
from ..memory import MemoryPool
from ..memory.image_layout import preferred
from ..step.check import LossFn


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass without updates.

    Attributes:
        loss: mean over samples.
        accuracy: share of samples whose greatest score is at the label; ``None``: targets are
            not classes.
        num_samples: how many there were.
        wall_s: seconds it took.
    """

    loss: float
    accuracy: float | None
    num_samples: int
    wall_s: float


def evaluate(
    model: nn.Module,
    loss_fn: LossFn,
    dataset: PackedDataset,
    pool: MemoryPool,
    *,
    batch_size: int,
    queue_size: int,
) -> Evaluation:
    """Run the model over all samples in order, in evaluation mode; the mode is restored.

    Batches go through ``pool``, whose layouts must be those of the dataset. Neither weights nor
    the random state change.
    """
    started = time.perf_counter()
    sampler = GlobalSampler(dataset.num_samples, batch_size, seed=0, shuffle=False)
    loss_sum = 0.0
    correct: int | None = None
    laid_out: Callable[[torch.Tensor], torch.Tensor] | None = None
    device = next(model.parameters()).device
    sums = getattr(loss_fn, "reduction", "mean") == "sum"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        batches = Prefetcher(dataset, sampler.batches(0), pool, queue_size=queue_size)
        with torch.inference_mode(), batches:
            for buffer in batches:
                x, y = (t.to(device) for t in buffer.rows())
                if laid_out is None:
                    laid_out = preferred(model, x)
                output = model(laid_out(x))
                loss_sum += loss_fn(output, y).item() * (1 if sums else len(x))
                if _are_classes(output, y):
                    correct = (correct or 0) + int((output.argmax(1) == y).sum())
                pool.release(buffer)
    finally:
        for module, mode in modes:
            module.training = mode
    count = dataset.num_samples
    return Evaluation(
        loss=loss_sum / count,
        accuracy=None if correct is None else correct / count,
        num_samples=count,
        wall_s=time.perf_counter() - started,
    )


def _are_classes(output: torch.Tensor, y: torch.Tensor) -> bool:
    return not y.is_floating_point() and y.dim() == 1 and output.dim() == 2
